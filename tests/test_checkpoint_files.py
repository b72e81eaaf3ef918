"""The files of a checkpoint: whatever is written can be read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training.runtime import checkpoint
from training.runtime.checkpoint import MANIFEST, STATE, Shards, _write_shard
from training.runtime.files import write_json
from training.runtime.host_room import HostRoom


def test_a_model_without_buffers_leaves_no_file_for_them(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    kinds: list[Any] = [("buffer", {}, {}), ("master", {"weight": weight}, {"weight": "0/6"})]
    entries = _write_shard(tmp_path, 0, kinds)
    assert list(entries) == ["rank-00000-master.safetensors"]
    write_json(tmp_path / MANIFEST, {**entries, STATE: {}})
    (tmp_path / "rank-00001-master.safetensors").write_text("not in the manifest")
    shards = Shards(tmp_path)
    shards.check({"weight": 6})
    shards.read("master", "weight", 2, out := torch.zeros(3))
    assert torch.equal(out, weight[2:5])


@pytest.mark.parametrize("indexed", [True, False])
def test_who_reads_a_part_opens_the_files_that_hold_it(indexed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand ranks do not open a thousand files each; the manifests of before do not say what is where."""
    weight, entries = torch.arange(12.0), dict[str, Any]()
    for rank in range(4):
        part = {"weight": weight[3 * rank : 3 * rank + 3]}
        entries |= _write_shard(tmp_path, rank, [("master", part, {"weight": f"{3 * rank}/12"})])
    assert all(entry["size"] == (tmp_path / name).stat().st_size for name, entry in entries.items())
    assert all(entry["sha256"] == checkpoint.sha256(tmp_path / name) for name, entry in entries.items())
    if not indexed:
        entries = {name: {key: entry[key] for key in ("size", "sha256")} for name, entry in entries.items()}
    write_json(tmp_path / MANIFEST, {**entries, STATE: {}})
    opened: list[str] = []
    real = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", lambda path, framework: opened.append(path.name) or real(path, framework))
    shards = Shards(tmp_path)
    shards.check({"weight": 12})
    shards.read("master", "weight", 4, out := torch.zeros(3))
    assert torch.equal(out, weight[4:7])
    wanted = range(1, 3) if indexed else range(4)
    assert sorted(opened) == [f"rank-0000{rank}-master.safetensors" for rank in wanted]


def test_a_room_is_filled_again_and_holds_what_was_there_when_it_was(tmp_path: Path) -> None:
    """Of any dtype and shape, views among them; its files are those of the tensors themselves."""
    flat = torch.arange(10.0)
    tensors = {"a": flat[1:4], "b": flat[4:], "flag": torch.tensor(True), "none": torch.empty(0), "turned": torch.ones(2, 3).T}
    kinds: list[Any] = [("master", tensors, {"a": "0/3"}), ("buffer", {"half": torch.ones(3, dtype=torch.bfloat16)}, {})]
    room = HostRoom()
    copies = room.copies(iter(kinds))
    written = _write_shard(tmp_path, 0, copies)
    assert written == _write_shard(tmp_path, 0, kinds)
    flat += 1
    (_, copied, places), _ = copies
    assert places == {"a": "0/3"} and copied["a"].tolist() == [1, 2, 3] and copied["turned"].shape == (3, 2)
    memory = copied["a"].untyped_storage().data_ptr()
    (_, again, _), _ = room.copies(kinds)
    assert again["a"].untyped_storage().data_ptr() == memory and again["a"].tolist() == [2, 3, 4]


def test_pages_are_locked_for_as_long_as_the_room_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        status, locked = 0, dict[int, int]()

        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            self.locked[address] = size
            return self.status

        def cudaHostUnregister(self, address: int) -> int:
            del self.locked[address]
            return 0

    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    room = HostRoom()
    room._make(1000, page_locked=True)
    room._make(900, page_locked=True)
    assert driver.locked == {room._bytes.data_ptr(): 1000}
    room._make(2000, page_locked=True)
    assert driver.locked == {room._bytes.data_ptr(): 2000}
    driver.status = 2
    with pytest.raises(OSError, match=r"could not be page-locked .*CUDA error 2.*checkpoint_in_background=false"):
        HostRoom()._make(10, page_locked=True)
    driver.status, driver.locked = 0, {room._bytes.data_ptr(): 2000}
    del room
    assert not driver.locked
