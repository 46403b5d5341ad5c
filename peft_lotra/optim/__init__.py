# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Optimizers made for LoTRA: learning rates per component, and Levenberg-Marquardt."""

from .learning_rates import create_lotra_optimizer, lotra_lr_multipliers
from .levenberg_marquardt import LevenbergMarquardt, LevenbergMarquardtStep


__all__ = ["LevenbergMarquardt", "LevenbergMarquardtStep", "create_lotra_optimizer", "lotra_lr_multipliers"]
