# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The two files of an adapter: what is in them, and the checks when they are read."""
