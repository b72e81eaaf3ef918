"""Sharded loading: pretrained weights are split over the ranks while they are read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ladir.config import Config, TrainSettings
from ladir.models.backbone import DTYPES, choose_dtype
from training.runtime.distributed import World
from training.runtime.ds_config import complete_ds_config, read_ds_config, zero_stage
from training.runtime.status import say

logger = logging.getLogger(__name__)


@contextmanager
def sharded_init(config: Config, train: TrainSettings, world: World) -> Iterator[None]:
    """LMs loaded inside (by all ranks together) are split as they are read, so that no rank ever holds a whole one.

    Only under ZeRO-3 with several processes or parameter offload, and where ``deepspeed.sharded_loading`` is set;
    otherwise nothing changes.  Small layers built inside stay whole until the engine splits them: their initialisation
    is the ordinary one.
    """
    say("loading the model")
    settings = read_ds_config(config.deepspeed.config)
    offloads = "offload_param" in settings.get("zero_optimization", {})
    if not config.deepspeed.sharded_loading or zero_stage(settings) != 3 or (world.size == 1 and not offloads):
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers looks it up, through a weak reference, whenever it makes a model.
    dtype = DTYPES[choose_dtype(config.backbone.dtype, world.device.type)]
    keep = HfDeepSpeedConfig(complete_ds_config(settings, train, dtype, world.size))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep
