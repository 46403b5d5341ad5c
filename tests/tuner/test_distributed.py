# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Data parallelism over one and two processes on the CPU, see `distributed_worker.py`."""

from __future__ import annotations

import pytest
from process_groups import start_group


NETWORKS = ("own", "efficient-kan")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[1, 2], ids=["world-1", "world-2"])
def ranks(request, tmp_path_factory):
    """What each of the processes of a group found; one group runs everything, since most of its time are imports."""
    return start_group("distributed_worker.py", request.param, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp-layers", "fsdp2", "fsdp2-layers"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_is_that_of_the_plain_model(ranks, network, kind):
    for rank in ranks:
        found = rank["results"][f"{network} {kind}"]
        assert found["frozen parameters moved"] == [] == found["trained parameters not moved"]
        # `saved` and `loaded` are the gathered adapter
        assert max(found[name] for name in ("output", "state", "saved", "loaded")) < 1e-5


@pytest.mark.parametrize("kind", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("network", NETWORKS)
def test_sharding_the_base_layer_alone_is_refused(ranks, network, kind):
    for rank in ranks:
        error, message = rank["wrong"][f"{network} {kind}"]
        assert error == "RuntimeError" and "Shard the LoTRALayer" in message
