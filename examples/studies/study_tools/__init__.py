# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What the studies share: the command line, and tasks that several of them adapt a KAN to."""
