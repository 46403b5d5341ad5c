# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The problems of the studies with their reference solutions, and the methods that several studies compare."""
