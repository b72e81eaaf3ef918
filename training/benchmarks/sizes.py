"""Model shapes and problem sizes of the benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ladir.config import Config
from training.planning.models import Lengths


@dataclass(frozen=True)
class Size:
    """A model and how much work a row gives it.

    ``scratch``: the LM as in ``backbone.scratch``; ``lengths``: of a record; ``records``, ``rollouts`` and ``sentences``: in a
    micro batch of denoiser, stage 2 and VAE; ``encoded``: sentences in one encoding pass; ``pack_tokens``: budget of packed
    rows; ``trajectories`` of one question and Euler ``steps`` per block, of which a row makes ``timed_steps`` (ours) and
    ``timed_obvious`` (every step of a block costs the same); ``rounds``: turns that a median is taken of; ``scaling``: values by
    quantity, at ``scaling_layers`` layers.
    """

    name: str
    scratch: Mapping[str, Any]
    lengths: Lengths
    latents: int
    latent_dim: int
    records: int
    rollouts: int
    sentences: int
    encoded: int
    pack_tokens: int
    trajectories: int
    steps: int
    timed_steps: int
    timed_obvious: int
    rounds: int
    scaling_layers: int
    scaling: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def config(self, device_type: str) -> Config:
        """Settings of a run of this size: the paper's, but for questions hidden at random; fp32 on a CPU, else bf16."""
        config = Config()
        config.backbone.scratch = dict(self.scratch)
        config.backbone.dtype = "float32" if device_type == "cpu" else "bfloat16"
        config.vae.latent_dim, config.vae.latents_per_block = self.latent_dim, self.latents
        config.denoiser.condition_dropout = 0.0
        return config


_SCALING = {
    "question tokens": (256, 512, 1024, 2048),
    "blocks": (4, 8, 16, 32),
    "latents per block": (2, 4, 8, 16),
    "draws": (1, 2, 4, 8),
    "trajectories": (25, 50, 100, 200),
    "ranks": (1, 2),
}


def _llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


_SIZES = (
    Size(  # only to see that everything runs
        name="smoke",
        scratch=_llama(2, 32, 64, 4, 2, 128),
        lengths=Lengths(question=6, blocks=2, block=5, answer=3),
        latents=2,
        latent_dim=8,
        records=2,
        rollouts=2,
        sentences=3,
        encoded=3,
        pack_tokens=16,
        trajectories=3,
        steps=3,
        timed_steps=2,
        timed_obvious=1,
        rounds=1,
        scaling_layers=1,
        scaling={
            "question tokens": (6, 12),
            "blocks": (1, 2),
            "latents per block": (1, 2),
            "draws": (1, 2),
            "trajectories": (2, 4),
        },
    ),
    Size(
        name="tiny",
        scratch=_llama(8, 512, 1376, 8, 8, 2048),
        lengths=Lengths(question=64, blocks=8, block=22, answer=32),
        latents=4,
        latent_dim=64,
        records=4,
        rollouts=1,
        sentences=16,
        encoded=32,
        pack_tokens=256,
        trajectories=100,
        steps=50,
        timed_steps=3,
        timed_obvious=1,
        rounds=3,
        scaling_layers=2,
        scaling=_SCALING,
    ),
    Size(
        name="100m",
        scratch=_llama(12, 768, 2048, 12, 12, 32000),
        lengths=Lengths(question=64, blocks=8, block=22, answer=32),
        latents=4,
        latent_dim=128,
        records=8,
        rollouts=8,
        sentences=128,
        encoded=256,
        pack_tokens=256,
        trajectories=100,
        steps=50,
        timed_steps=5,
        timed_obvious=1,
        rounds=3,
        scaling_layers=4,
        scaling=_SCALING,
    ),
    Size(  # Llama-3.2-1B
        name="1b",
        scratch=_llama(16, 2048, 8192, 32, 8, 128256, tied=True),
        lengths=Lengths(question=128, blocks=8, block=22, answer=32),
        latents=4,
        latent_dim=512,
        records=32,
        rollouts=12,
        sentences=256,
        encoded=1024,
        pack_tokens=4096,
        trajectories=100,
        steps=50,
        timed_steps=10,
        timed_obvious=1,
        rounds=5,
        scaling_layers=4,
        scaling=_SCALING,
    ),
    Size(  # Llama-3.1-8B
        name="8b",
        scratch=_llama(32, 4096, 14336, 32, 8, 128256),
        lengths=Lengths(question=128, blocks=8, block=22, answer=32),
        latents=4,
        latent_dim=512,
        records=4,
        rollouts=2,
        sentences=128,
        encoded=512,
        pack_tokens=4096,
        trajectories=100,
        steps=50,
        timed_steps=5,
        timed_obvious=1,
        rounds=3,
        scaling_layers=2,
        scaling=_SCALING,
    ),
)

SIZES = {size.name: size for size in _SIZES}
