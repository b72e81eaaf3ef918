"""The report on a VAE's latents: reading them, and what the probe learns of them."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress

import pytest
import torch

from ladir.data.latents import LatentRecord
from ladir.inference.decode import thought_ids
from ladir.models.probe import Blocks, Probe, active_units, latent_report, probe, read
from tests.tiny import EOS, random_records, tiny_vae

CPU = torch.device("cpu")
ZEROS, ONES = torch.zeros(3), torch.ones(3)


def chains(count: int, copied: bool, seed: int) -> list[LatentRecord]:
    """Records of two blocks of one latent; the second is the first with its sign changed, or as random as it."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        mu = torch.randn(2, 1, 3, generator=generator)
        mu[1] = -mu[0] if copied else mu[1]
        records.append(LatentRecord([5], [[3, 4], [5]], [6], mu, torch.full_like(mu, -9.0)))
    return records


def test_the_probe_tells_latents_that_follow_from_others_from_random_ones() -> None:
    found = {
        copied: probe(*(Blocks.of(chains(300, copied, seed), ZEROS, ONES) for seed in (0, 1)), 40, 3, CPU).flow_explained
        for copied in (False, True)
    }
    assert found[False] == pytest.approx(1 - math.pi / 4, abs=0.02)
    assert found[True] > found[False] + 0.1


def test_the_probes_figures_are_the_seeds_and_its_estimate_is_of_the_clean_latents() -> None:
    trained, held_out = (Blocks.of(chains(40, True, seed), ZEROS, ONES) for seed in (0, 1))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (probe(trained, held_out, 3, seed, CPU) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())  # a training that follows draws what it did
    assert one.flow_explained == same.flow_explained != other.flow_explained
    assert torch.equal(one.estimate, same.estimate) and one.estimate.shape == held_out.z0.shape
    learned = probe(trained, held_out, 60, 0, CPU)
    assert (learned.estimate - held_out.z0).square().mean() < (one.estimate - held_out.z0).square().mean()


def test_blocks_know_what_is_before_them() -> None:
    records = random_records(3)
    mean, std = torch.randn(3), torch.rand(3) + 0.5
    blocks = Blocks.of(records, mean, std)
    row = 0
    for record in records:
        for number, mu in enumerate(record.mu):
            assert torch.allclose(blocks.z0[row] * std + mean, mu, atol=1e-6)
            assert torch.equal(blocks.before[row], blocks.z0[row - 1] if number else torch.zeros(2, 3))
            assert (blocks.place[row], blocks.questions[row], blocks.sentences[row]) == (
                number,
                record.question,
                record.blocks[number],
            )
            row += 1
    assert row == len(blocks)


def test_the_probe_knows_the_tokens_it_was_trained_on() -> None:
    model = Probe(1, 3, [7, 4, 9])
    assert model.known([[4, 7, 9], [8], [100, 4]]).tolist() == [[2, 3, 4], [1, 0, 0], [1, 2, 0]]
    assert Probe(1, 3, []).known([[4], []]).tolist() == [[1], [0]]


@torch.no_grad()
def test_a_sentence_is_read_exactly_where_greedy_decoding_writes_it() -> None:
    decoder = tiny_vae(bos=(4,)).thought_decoder
    z = 2 * torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(1))
    written = thought_ids(decoder, EOS, z, max_tokens=12)
    ended = [row for row, ids in enumerate(written) if 0 < len(ids) < 12]
    assert ended
    wrong = [[*ids[:-1], 2 if ids[-1] != 2 else 3] for ids in (written[row] for row in ended)]
    assert read(decoder, z[ended], [written[row] for row in ended], EOS).exact == 1.0
    found = read(decoder, z[ended], wrong, EOS)
    assert found.exact == 0.0 and 0 <= found.token_accuracy < 1 and found.cross_entropy > 0


def test_a_report_has_its_figures_and_without_steps_no_probes() -> None:
    decoder, records = tiny_vae().thought_decoder, random_records(6)
    whole = latent_report(decoder, records[:4], records[4:], ZEROS, ONES, 0.0, 2, EOS, seed=0)
    short = latent_report(decoder, records[:4], records[4:], ZEROS, ONES, 3.0, 0, EOS, seed=0)
    assert {name for name in whole if name.startswith("probe_")} == {
        "probe_flow_explained",
        "probe_token_cross_entropy",
        "probe_exact",
    }
    assert short.keys() == {name for name in whole if not name.startswith("probe_")}
    assert short["active_units"] == active_units(torch.cat([record.mu for record in records[4:]]))


def test_a_report_can_be_ended_between_its_pieces() -> None:
    """Before what it reads of means, of noisy ones and from half noise, and before every step of the probe."""
    decoder, records = tiny_vae().thought_decoder, random_records(6)

    def looks(end_at: int) -> int:
        seen = itertools.count(1)

        def between() -> None:
            if next(seen) == end_at:
                raise InterruptedError

        with suppress(InterruptedError):
            latent_report(decoder, records[:4], records[4:], ZEROS, ONES, 0.0, 2, EOS, seed=0, between=between)
        return next(seen) - 1

    assert [looks(end_at) for end_at in (0, 1, 2, 3, 4, 5)] == [5, 1, 2, 3, 4, 5]
