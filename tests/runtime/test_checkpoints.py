"""resume.py: what is saved on some ranks and read on others, killed and damaged writes, and other runs."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing

from config import Config, ConfigError, load_config
from data import load_samples
from evaluate import load_split
from qwen.checkpoint import load_policy
from runtime import checkpoints, distributed
from runtime.checkpoints import Progress
from runtime.files import UserError
from runtime.fingerprints import MAY_CHANGE, fingerprints
from samples import Track

MARKS = {"settings": {}, "model": "m", "data": "d"}


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def step(model, optimizer, n):
    """A step whose gradient depends on the weights, the step and nothing else, and on each number alone."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = p.detach() * 3 + n
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def contents(model, optimizer):
    """(name, part) -> whole tensor: the weights and Adam's state, gathered by none of the code under test."""
    found = {}
    for name, p in model.named_parameters():
        for part, value in {"weight": p.detach(), **optimizer.state.get(p, {})}.items():
            found[name, part] = getattr(value, "full_tensor", value.clone)()
    return found


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def tensors_in(folder):
    return dcp.FileSystemReader(folder / "state").read_metadata().state_dict_metadata


@pytest.fixture
def place(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def trained(checkpoints, tmp_path_factory):
    """(folder of a checkpoint that one process wrote after two steps, what is in it). To be read only."""
    run = tmp_path_factory.mktemp("trained")
    policy = load_policy(str(checkpoints["qwen2_5_vl"]))
    optimizer = adamw(policy.model)
    for n in range(2):
        step(policy.model, optimizer, n)
    checkpoints.save(run / "checkpoint_2", policy, optimizer, Progress(step=2), MARKS)
    return run / "checkpoint_2", contents(policy.model, optimizer)


# ----------------------------------------------------------------------------------------------------------
# Ranks: real processes, forked from a server that has imported everything


def _rank(rank, function, ranks, meet, arguments):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=ranks)
    function(*arguments)
    distributed.barrier()
    distributed.destroy()


def on_ranks(ranks, function, *arguments, meet, timeout=60):
    """Run function(*arguments) on so many ranks; fail where one of them raises or hangs."""
    multiprocessing.set_forkserver_preload([__name__])
    work = (function, ranks, meet, arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server does not get pytest's otherwise
        jobs = torch.multiprocessing.start_processes(
            _rank, work, ranks, join=False, start_method="forkserver"
        )
    end = time.time() + timeout
    while not jobs.join(timeout=0.2):
        if time.time() > end:
            for process in jobs.processes:
                process.kill()
            pytest.fail(f"{function.__name__} hangs")


def sharded(base):
    policy = load_policy(base)
    distributed.shard(policy.model, policy.blocks, torch.float32)
    return policy, adamw(policy.model)


def load_and_save(base, source, target, result):
    policy, optimizer = sharded(base)
    assert distributed.is_sharded(policy.model)
    checkpoints.load(source, policy.model, optimizer)
    found = contents(policy.model, optimizer)
    if distributed.init()[0] == 0:
        torch.save(found, result)
    checkpoints.save(target, policy, optimizer, Progress(step=2), MARKS)
    reference = load_policy(base, torch.bfloat16)
    reference.model.requires_grad_(False)
    distributed.shard(reference.model, reference.blocks, torch.bfloat16)
    checkpoints.load_weights(source, reference.model)
    for name, p in reference.model.named_parameters():
        assert torch.equal(p.full_tensor(), found[name, "weight"].bfloat16())


def test_written_on_some_ranks_read_on_others(trained, checkpoints, tmp_path):
    """1 -> 2 -> 4 -> 2 -> 1, and after each the same bits as in the process that trained; rounded in a frozen
    reference."""
    source, expected = trained
    base = str(checkpoints["qwen2_5_vl"])
    for n, ranks in enumerate((2, 4, 2)):
        target, result = tmp_path / f"checkpoint_{n}", tmp_path / f"{n}.pt"
        on_ranks(ranks, load_and_save, base, source, target, result, meet=tmp_path / f"meet{n}")
        assert same(torch.load(result), expected)
        assert len(list((target / "state").glob("*.distcp"))) == ranks
        source = target
    policy = load_policy(base)
    optimizer = adamw(policy.model)
    assert not same(contents(policy.model, optimizer), contents(load_policy(str(source)).model, optimizer))
    checkpoints.load(source, policy.model, optimizer)
    assert same(contents(policy.model, optimizer), expected)
    exported = load_policy(str(source)).model.state_dict()
    for name, p in policy.model.state_dict().items():
        assert torch.equal(exported[name], p)


def train_with_pause(base, run):
    """Three steps with a real loss, and two and one with a checkpoint between, on this rank's own text."""
    ends = []
    for pause in (False, True):
        policy, optimizer = sharded(base)
        for n in range(3):
            if pause and n == 2:
                checkpoints.save(run / "checkpoint_2", policy, optimizer, Progress(step=2), MARKS)
                policy, optimizer = sharded(base)
                checkpoints.load(run / "checkpoint_2", policy.model, optimizer)
            ids = torch.arange(10 * n, 10 * n + 8)[None] + distributed.init()[0]
            policy.model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert any(value["exp_avg"].full_tensor().abs().max() > 0 for value in optimizer.state.values())
        step(policy.model, optimizer, 3)  # of every parameter: the loss leaves the vision tower out
        ends.append(contents(policy.model, optimizer))
    assert same(*ends)


def test_a_pause_changes_nothing_on_two_ranks(checkpoints, place, tmp_path):
    on_ranks(2, train_with_pause, str(checkpoints["qwen2_5_vl"]), place, meet=tmp_path / "meet")


def test_a_pause_changes_nothing(checkpoints, place):
    """In one process, with a real loss that leaves the vision tower out: it has no Adam's state when it is
    saved, gets the one before the first step, and goes on like one that was never saved."""
    ends = []
    for pause in (False, True):
        policy = load_policy(str(checkpoints["qwen2_5_vl"]))
        optimizer = adamw(policy.model)
        for n in range(3):
            if pause and n == 1:
                checkpoints.save(place / "checkpoint_1", policy, optimizer, Progress(step=1), MARKS)
            if pause and n == 2:
                checkpoints.save(place / "checkpoint_2", policy, optimizer, Progress(step=2), MARKS)
                policy = load_policy(str(checkpoints["qwen2_5_vl"]))
                optimizer = adamw(policy.model)
                checkpoints.load(place / "checkpoint_2", policy.model, optimizer)
            ids = torch.arange(10 * n, 10 * n + 8)[None]
            policy.model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step(policy.model, optimizer, 3)  # every parameter
        ends.append(contents(policy.model, optimizer))
    assert {value.item() for key, value in ends[0].items() if key[1] == "step"} == {1, 4}
    assert same(*ends)


def test_saved_before_the_first_step(checkpoints, place):
    """Saving neither takes a step nor counts one; what is loaded goes on like what was never saved."""
    policies = [load_policy(str(checkpoints["qwen2_5_vl"])) for _ in range(3)]
    optimizers = [adamw(policy.model) for policy in policies]
    checkpoints.save(place / "checkpoint_0", policies[1], optimizers[1], Progress(), MARKS)
    assert not optimizers[1].state
    step(policies[2].model, optimizers[2], 5)
    checkpoints.load(place / "checkpoint_0", policies[2].model, optimizers[2])
    for policy, optimizer in zip(policies, optimizers, strict=True):
        step(policy.model, optimizer, 0)
    wanted, *others = (contents(p.model, o) for p, o in zip(policies, optimizers, strict=True))
    assert all(same(other, wanted) for other in others)


# ----------------------------------------------------------------------------------------------------------
# What is in a checkpoint


def test_frozen_parameters_are_not_kept(qwen2_5, place):
    """Nor a tied weight twice, nor one that is frozen under its second name."""
    model = qwen2_5.model
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    checkpoints.save(place / "checkpoint_1", qwen2_5, adamw(model), Progress(step=1), MARKS)
    names = [name for name, _ in model.named_parameters()]
    parts = ("exp_avg", "exp_avg_sq", "step")
    wanted = {f"model.{n}" for n in names} | {f"adam.{n}.{part}" for n in names for part in parts}
    assert tensors_in(place / "checkpoint_1").keys() == wanted

    model.model.visual.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    checkpoints.save(place / "checkpoint_2", qwen2_5, adamw(model), Progress(step=2), MARKS)
    trained = [n for n in names if "visual" not in n and "embed_tokens" not in n]
    wanted = {f"model.{n}" for n in trained} | {f"adam.{n}.{part}" for n in trained for part in parts}
    assert tensors_in(place / "checkpoint_2").keys() == wanted and 0 < len(trained) < len(names) - 10


def test_files_and_progress(qwen2_5, place, recwarn, capfd):
    """The logs are measured, progress comes back, the terminal stays clean."""
    (place / "metrics.jsonl").write_bytes(b"12345\n")
    progress = Progress(sft_step=3, step=7, best={"step": 5, "m_vIoU": 0.25})
    checkpoints.save(place / "checkpoint_7", qwen2_5, adamw(qwen2_5.model), progress, MARKS)
    checkpoints.load(place / "checkpoint_7", qwen2_5.model, adamw(qwen2_5.model))
    found = checkpoints.last_checkpoint(place)
    assert found.folder == place / "checkpoint_7" and found.marks == MARKS and found.format == 1
    assert found.progress == dataclasses.replace(progress, positions={"metrics.jsonl": 6})
    assert progress.positions == {}
    assert not recwarn.list and capfd.readouterr() == ("", "")
    record = json.loads((place / "checkpoint_7/state/progress.json").read_text())
    kept = ("state/.metadata", "state/__0_0.distcp", "model.safetensors")
    files = {name: size for name, size in listing(place / "checkpoint_7").items() if name in kept}
    assert record["files"] == files and len(files) == 3 and min(files.values()) > 0
    assert {path.name for path in place.iterdir()} == {"metrics.jsonl", "checkpoint_7"}


def test_weights_for_a_frozen_reference(trained, checkpoints):
    """In its own dtype, rounded as torch rounds."""
    folder, expected = trained
    model = load_policy(str(checkpoints["qwen2_5_vl"]), torch.bfloat16).model.requires_grad_(False)
    checkpoints.load_weights(folder, model)
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, expected[name, "weight"].bfloat16())


def test_weights_that_were_frozen_stay(qwen2_5, checkpoints, place):
    qwen2_5.model.model.visual.requires_grad_(False)
    optimizer = adamw(qwen2_5.model)
    step(qwen2_5.model, optimizer, 1)
    checkpoints.save(place / "checkpoint_1", qwen2_5, optimizer, Progress(step=1), MARKS)
    other = load_policy(str(checkpoints["qwen2_5_vl"])).model
    with torch.no_grad():
        for p in other.model.visual.parameters():
            p.fill_(7)
    checkpoints.load_weights(place / "checkpoint_1", other)
    trained = dict(qwen2_5.model.named_parameters())
    for name, p in other.named_parameters():
        assert (p == 7).all() if "visual" in name else torch.equal(p, trained[name])


# ----------------------------------------------------------------------------------------------------------
# A disk that is full


def save_on_a_full_disk(base, run, full, limit):
    """On one rank no file can grow beyond the limit (bytes); all say so."""
    policy, optimizer = sharded(base)
    if distributed.init()[0] == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with pytest.raises(UserError) as caught:
        checkpoints.save(run / "checkpoint_2", policy, optimizer, Progress(step=2), MARKS)
    (run / f"said_{distributed.init()[0]}").write_text(str(caught.value))


@pytest.mark.parametrize("full", [0, 1])
def test_full_disk_of_one_rank(trained, checkpoints, place, tmp_path, full):
    """On rank 0 the export fails, on rank 1 DCP; a checkpoint of the same step that was there stays whole."""
    shutil.copytree(trained[0], place / "checkpoint_2")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    base = str(checkpoints["qwen2_5_vl"])
    on_ranks(2, save_on_a_full_disk, base, place, full, 20_000, meet=tmp_path / "meet")
    reason = "File too large"  # a full disk says: No space left on device
    for rank in range(2):
        said = (place / f"said_{rank}").read_text()
        assert said.startswith(f"{place}/checkpoint_2: cannot be written (") and "\n" not in said
        assert (
            reason in said
            and ".tmp" not in said
            and said.endswith("; free some space, then start again with resume=auto")
        )
        (place / f"said_{rank}").unlink()
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert {path.name for path in place.iterdir()} == {"checkpoint_2"}


@pytest.mark.parametrize("limit", [8, 100_000, 200_000, 300_000])
def test_full_disk_in_one_process(qwen2_5, place, limit):
    """Wherever in the writing it fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    optimizer = adamw(qwen2_5.model)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(UserError, match=r"/checkpoint_1: cannot be written \(.*File too large") as caught:
            checkpoints.save(place / "checkpoint_1", qwen2_5, optimizer, Progress(step=1), MARKS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert ".tmp" not in str(caught.value) and "\n" not in str(caught.value)
    assert not list(place.iterdir())
    checkpoints.save(place / "checkpoint_1", qwen2_5, optimizer, Progress(step=1), MARKS)
    assert checkpoints.last_checkpoint(place).progress.step == 1


def test_ctrl_c_while_it_is_written(qwen2_5, place, monkeypatch):
    """DCP makes it an error of its own; it is no disk that is full."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(place / "checkpoint_1", qwen2_5, adamw(qwen2_5.model), Progress(step=1), MARKS)
    assert checkpoints.last_checkpoint(place) is None and names(place) == {"checkpoint_1.tmp"}
    checkpoints.tidy(place)
    assert not list(place.iterdir())


# ----------------------------------------------------------------------------------------------------------
# Damage, and kills


def plain(run, name, sft_step=0, step=0, weights=b"weights"):
    """A checkpoint as last_checkpoint sees it, written by hand."""
    state = run / name / "state"
    state.mkdir(parents=True)
    (state / "__0_0.distcp").write_bytes(weights)
    (run / name / "model.safetensors").write_bytes(weights * 2)
    progress = {"sft_step": sft_step, "step": step, "positions": {}, "best": None}
    files = {"state/__0_0.distcp": len(weights), "model.safetensors": 2 * len(weights)}
    record = {"format": 1, "progress": progress, "marks": MARKS, "files": files}
    (state / "progress.json").write_text(json.dumps(record))
    return run / name


def names(run):
    return {path.name for path in run.iterdir()}


def listing(folder):
    """All that is in it: relative path -> size, None for a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.stat().st_size for path in paths}


def last(run):
    """last_checkpoint, which changes nothing, whatever it finds."""
    before = listing(run)
    try:
        return checkpoints.last_checkpoint(run)
    finally:
        assert listing(run) == before


def test_the_furthest_one(place):
    assert checkpoints.last_checkpoint(place) is None and checkpoints.last_checkpoint(place / "none") is None
    order = {"checkpoint_sft_2": (2, 0), "checkpoint_sft_10": (10, 0), "checkpoint_2": (10, 2)}
    order |= {"checkpoint_10": (10, 10), "checkpoint": (10, 12)}
    for name, steps in order.items():
        plain(place, name, *steps)
        found = last(place)
        assert (found.folder.name, found.progress.sft_step, found.progress.step) == (name, *steps)
    for name in (
        "checkpoint_40.mine",
        "checkpoint_40.old.mine",
        "best_40",
        "best_41.old",
        "checkpoint_40.tmp",
    ):
        plain(place, name, 10, 40)  # a user's, and no checkpoints
    assert last(place).folder == place / "checkpoint"


def test_the_end_is_further_on_than_a_stop_in_the_last_step(place):
    """After a signal in the last of twelve steps there is checkpoint_12; gone on, the end is there, too, with
    all that comes after the steps."""
    plain(place, "checkpoint_12", step=12)
    assert last(place).folder.name == "checkpoint_12"
    plain(place, "checkpoint", step=12)
    assert last(place).folder.name == "checkpoint"
    (place / "checkpoint").rename(place / "checkpoint.old")
    assert last(place).folder.name == "checkpoint.old"
    plain(place, "checkpoint_13", step=13)
    assert last(place).folder.name == "checkpoint_13"


DAMAGES = {
    "missing": (
        lambda state: (state / "__0_0.distcp").unlink(),
        "No such file or directory: '{}/__0_0.distcp'",
    ),
    "cut": (lambda state: os.truncate(state / "__0_0.distcp", 3), "state/__0_0.distcp is not 7 bytes long"),
    "weights missing": (
        lambda state: (state.parent / "model.safetensors").unlink(),
        "No such file or directory: '{.parent}/model.safetensors'",
    ),
    "weights cut": (
        lambda state: os.truncate(state.parent / "model.safetensors", 3),
        "(ValueError: model.safetensors is not 14 bytes long)",
    ),
    "weights longer": (
        lambda state: os.truncate(state.parent / "model.safetensors", 15),
        "(ValueError: model.safetensors is not 14 bytes long)",
    ),
    "no state": (shutil.rmtree, "No such file or directory: '{}/progress.json'"),
    "progress cut": (lambda state: os.truncate(state / "progress.json", 30), "JSONDecodeError: "),
    "progress empty": (lambda state: os.truncate(state / "progress.json", 0), "JSONDecodeError: "),
    "progress missing": (lambda state: (state / "progress.json").unlink(), "'{}/progress.json'"),
    "other progress": (lambda state: (state / "progress.json").write_text("[]"), "TypeError: "),
    "no progress": (
        lambda state: (state / "progress.json").write_text('{"files": {}}'),
        "KeyError: 'progress'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ones_are_passed_over(place, capsys, damage):
    plain(place, "checkpoint_1", step=1)
    folder = plain(place, "checkpoint_2", step=2)
    act, said = DAMAGES[damage]
    act(folder / "state")
    assert last(place).folder.name == "checkpoint_1"
    line = capsys.readouterr().err
    assert line.startswith(f"{folder} is damaged and passed over (") and line.count("\n") == 1
    assert said.format(folder / "state") in line
    shutil.rmtree(place / "checkpoint_1")
    with pytest.raises(UserError) as caught:
        last(place)
    remedy = "put one back, or set another output_dir"
    assert str(caught.value) == f"resume: no checkpoint in {place} is whole; {remedy}"
    assert capsys.readouterr().err == line  # why


def test_one_that_was_being_replaced_counts_where_its_successor_is_missing(place, capsys):
    """Killed between two renames; and what is left of one that was replaced is no damage."""
    plain(place, "checkpoint_2.old", step=2)
    plain(place, "checkpoint_2.tmp", step=2)
    plain(place, "checkpoint_1", step=1)
    assert last(place).folder.name == "checkpoint_2.old"
    plain(place, "checkpoint_1.old", step=9)  # all is there but for the removal of this
    plain(place, "checkpoint_2", step=2)
    (place / "checkpoint_2.old/state/progress.json").unlink()
    assert last(place).folder.name == "checkpoint_2" and capsys.readouterr().err == ""
    shutil.rmtree(place / "checkpoint_2")
    assert last(place).folder.name == "checkpoint_1"
    assert capsys.readouterr().err.startswith(f"{place}/checkpoint_2.old is damaged and passed over (")
    for name in ("checkpoint_1", "checkpoint_1.old"):
        shutil.rmtree(place / name)
    with pytest.raises(UserError, match=f"resume: no checkpoint in {place} is whole; "):
        last(place)
    shutil.rmtree(place / "checkpoint_2.old")
    assert last(place) is None  # a .tmp was never whole


def look(run, damaged):
    """What rank 0 finds, all find, and only that one says what is damaged; where it fails, all do."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = checkpoints.last_checkpoint(run)
    assert found.folder.name == "checkpoint_2"
    assert said.getvalue().count("\n") == (distributed.init()[0] == 0)
    with pytest.raises(OSError, match=r"checkpoint_1.tmp"):
        checkpoints.prune(run, 1)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        checkpoints.last_checkpoint(damaged)


def test_all_ranks_find_the_same(place, tmp_path):
    for n in (1, 2, 3):
        plain(place, f"checkpoint_{n}", step=n)
    (place / "checkpoint_3/state/__0_0.distcp").unlink()
    (place / "checkpoint_1.tmp").write_text("a file, over which no folder can be renamed")
    shutil.rmtree(plain(tmp_path / "other", "checkpoint", step=1) / "state")
    on_ranks(2, look, place, tmp_path / "other", meet=tmp_path / "meet")


LEFT = {  # what a kill leaves of NAME -> which of it NAME is afterwards
    "tmp": None,  # the first time, while it is written
    "name tmp": "name",  # while it is written again
    "old tmp": "old",  # between the two renames
    "name old": "name",  # while what was there is removed
    "old": "old",
    "name old tmp": "name",
    "name": "name",
}


@pytest.mark.parametrize("name", ["checkpoint_4", "checkpoint_sft_4", "checkpoint", "best_4"])
@pytest.mark.parametrize("left", LEFT)
def test_kills_while_one_is_replaced(place, name, left):
    """tidy takes what was there back, or removes it; the checkpoint that was found is that one, too."""
    for part in left.split():
        folder = plain(place, name if part == "name" else f"{name}.{part}", step=4, weights=part.encode())
        if part == "tmp" or (part == "old" and "name" in left):  # half written, half removed
            (folder / "state/progress.json").unlink()
    found = last(place)
    assert bool(found) == (LEFT[left] is not None and name != "best_4")
    checkpoints.tidy(place)
    assert names(place) == ({name} if LEFT[left] else set())
    if LEFT[left]:
        expected = LEFT[left].encode()
        assert (place / name / "state/__0_0.distcp").read_bytes() == expected
        assert (place / name / "model.safetensors").read_bytes() == expected * 2
    if found:
        assert found.folder.with_suffix("") == place / name == last(place).folder


def test_what_is_no_leftover_stays(place):
    """Whatever else is there, also of a similar name."""
    for name in ("checkpoint_4.mine", "checkpoint_4.old.mine", "my_checkpoint_4.old", "checkpoint_a.tmp"):
        plain(place, name)
    for name in ("best.old", "pictures.tmp", "predictions.old"):
        plain(place, name)
    for name in ("metrics.jsonl", "config.yaml.1234.tmp", "notes.old"):
        (place / name).write_text("mine")
    before = listing(place)
    plain(place, "checkpoint_5.tmp")
    checkpoints.tidy(place)
    assert listing(place) == before


def test_a_kill_at_any_rename(qwen2_5, place, monkeypatch):
    """A checkpoint of the same name is replaced; killed before or after any rename, one of them is whole."""
    optimizer = adamw(qwen2_5.model)
    rename, renames = Path.rename, []

    class Killed(BaseException):
        pass

    def counted(path, target):
        if path.name.startswith("checkpoint"):  # DCP renames, too
            renames.append(path.name)
            if len(renames) == kill:
                raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", counted)
    for kill, best in ((1, 0), (2, 0), (3, 3)):
        shutil.rmtree(place)
        place.mkdir()
        monkeypatch.setattr(Path, "rename", rename)
        checkpoints.save(
            place / "checkpoint_1", qwen2_5, optimizer, Progress(step=1, best={"kill": 0}), MARKS
        )
        monkeypatch.setattr(Path, "rename", counted)
        renames.clear()
        try:
            checkpoints.save(
                place / "checkpoint_1", qwen2_5, optimizer, Progress(step=1, best={"kill": 3}), MARKS
            )
        except Killed:
            assert kill < 3
        assert len(renames) == min(kill, 2)
        monkeypatch.setattr(Path, "rename", rename)
        found = last(place)
        assert found.progress.best == {"kill": best} and found.folder.stem == "checkpoint_1"
        left = {1: {"checkpoint_1", "checkpoint_1.tmp"}, 2: {"checkpoint_1.old", "checkpoint_1.tmp"}}
        assert names(place) == left.get(kill, {"checkpoint_1"})
        checkpoints.tidy(place)
        assert last(place).progress.best == {"kill": best} and names(place) == {"checkpoint_1"}


def test_stale_folders_are_no_part_of_the_next(qwen2_5, place):
    for name in ("checkpoint_1.tmp", "checkpoint_1.old"):
        (place / name / "state").mkdir(parents=True)
        (place / name / "state/stale").write_text("of a run that was killed")
    plain(place, "checkpoint_1", step=1)
    checkpoints.save(place / "checkpoint_1", qwen2_5, adamw(qwen2_5.model), Progress(step=1), MARKS)
    assert names(place) == {"checkpoint_1"} and not list(place.rglob("stale"))
    assert (place / "checkpoint_1/config.json").exists()


def test_state_that_cannot_be_read(trained, place, qwen2_5):
    """Of the right length, but not what was written."""
    folder = shutil.copytree(trained[0], place / "checkpoint_2")
    data = folder / "state/__0_0.distcp"
    data.write_bytes(bytes(data.stat().st_size))
    assert last(place).folder == folder
    with pytest.raises(
        UserError, match=r"checkpoint_2: cannot be read \(.*\); remove it, and start again"
    ) as caught:
        checkpoints.load(folder, qwen2_5.model, adamw(qwen2_5.model))
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------
# What goes, and what stays


def test_prune(place):
    for n in (2, 4):
        plain(place, f"checkpoint_sft_{n}", n, 0)
    for n in (9, 10, 11):
        plain(place, f"checkpoint_{n}", 4, n)
    damaged = plain(place, "checkpoint_30", 4, 30)
    (damaged / "state/__0_0.distcp").unlink()
    plain(place, "checkpoint", 4, 8)
    plain(place, "best_3", 4, 3)
    stay = {"checkpoint_sft_4", "checkpoint_30", "checkpoint", "best_3"}
    checkpoints.prune(place, 4, spare=[place / "checkpoint_sft_4"])
    assert names(place) == {*stay, "checkpoint_9", "checkpoint_10", "checkpoint_11"}
    checkpoints.prune(place, 2, spare=[place / "checkpoint_sft_4"])
    assert names(place) == {*stay, "checkpoint_10", "checkpoint_11"}
    checkpoints.prune(place, 1)
    assert names(place) == {*stay, "checkpoint_11"} - {"checkpoint_sft_4"}


def test_a_kill_while_one_is_removed(place, monkeypatch):
    """What is left of it never looks like a checkpoint, and goes at the next start."""
    for n in (1, 2):
        plain(place, f"checkpoint_{n}", step=n)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    checkpoints.prune(place, 1)
    assert names(place) == {"checkpoint_1.tmp", "checkpoint_2"}
    monkeypatch.undo()
    assert last(place).progress.step == 2
    checkpoints.tidy(place)
    assert names(place) == {"checkpoint_2"}


def test_the_best_one(qwen2_5, place):
    plain(place, "checkpoint_5", step=5)
    checkpoints.replace_best(place, qwen2_5, 5)
    with torch.no_grad():
        qwen2_5.model.lm_head.weight.add_(1)
    checkpoints.replace_best(place, qwen2_5, 10)
    assert names(place) == {"checkpoint_5", "best_10"} and not (place / "best_10/state").exists()
    assert torch.equal(load_policy(str(place / "best_10")).model.lm_head.weight, qwen2_5.model.lm_head.weight)
    checkpoints.replace_best(place, qwen2_5, 10)
    assert names(place) == {"checkpoint_5", "best_10"}


def test_logs_are_cut_back(place):
    metrics, rollouts = place / "metrics.jsonl", place / "rollouts.jsonl"
    metrics.write_bytes(b"1\n2\n3\n")
    rollouts.write_bytes(b"11\n22\n")
    checkpoints.cut_back(place, Progress(positions={"metrics.jsonl": 4, "rollouts.jsonl": 6}))
    assert (metrics.read_bytes(), rollouts.read_bytes()) == (b"1\n2\n", b"11\n22\n")
    with pytest.raises(UserError, match=r"rollouts.jsonl: has 6 bytes, and had 7 when .*; put it back, or"):
        checkpoints.cut_back(place, Progress(positions={"metrics.jsonl": 2, "rollouts.jsonl": 7}))
    assert metrics.read_bytes() == b"1\n2\n"
    checkpoints.cut_back(place, Progress(positions={"metrics.jsonl": 2}))  # there were no rollouts yet
    assert (metrics.read_bytes(), rollouts.read_bytes()) == (b"1\n", b"")
    metrics.unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl: has 0 bytes, and had 2 "):
        checkpoints.cut_back(place, Progress(positions={"metrics.jsonl": 2}))


# ----------------------------------------------------------------------------------------------------------
# Whether it is the same run


def marks_now(config):
    """As train.main takes them: of both splits."""
    splits = [load_split(config, path)[0] for path in (config.train_annotations, config.eval_annotations)]
    return fingerprints(config, splits[0] + splits[1][: config.eval_limit or None])


def refusal(place, write_config, changes=(), marks=None, **record):
    """What refuse_other says to a run with these changes, of a checkpoint of the run without them."""
    path = write_config(place, steps=5)
    config, other = load_config(path), load_config(path, changes)
    found = checkpoints.Checkpoint(place / "checkpoint_5", Progress(step=5), marks_now(config), 1)
    found = dataclasses.replace(found, **record)
    found = dataclasses.replace(found, marks=json.loads(json.dumps(found.marks)) | (marks or {}))
    try:
        checkpoints.refuse_other(found, other, marks_now(other))
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)


def test_the_same_run_goes_on(place, write_config, world, checkpoints, tmp_path):
    """Also with other settings that are free, moved data and a moved model."""
    shutil.copytree(world, tmp_path / "world")
    shutil.copytree(checkpoints["qwen2_5_vl"], tmp_path / "model")
    free = {"steps": 9, "video_workers": 1, "on_bad_video": "skip", "sync_gradients": "each", "keep": 7}
    free |= {"model": tmp_path / "model", "videos": tmp_path / "world", "save_every": 3, "micro_batch": 1}
    free |= {"train_annotations": tmp_path / "world/all.json", "output_dir": place, "log_to": "[wandb]"}
    free |= {"eval_annotations": tmp_path / "world/all.json", "eval_every": 1, "eval_batch": 2}
    assert refusal(place, write_config) is None
    for key in free:
        data = ("videos", "train_annotations", "eval_annotations")
        changes = [f"{name}={free[name]}" for name in (data if key in data else (key,))]
        assert refusal(place, write_config, changes) is None
    assert {field.name for field in dataclasses.fields(Config)} >= MAY_CHANGE


def test_fewer_steps_than_are_done(place, write_config):
    said = refusal(place, write_config, ["steps=4"])
    assert said == f"resume: {place}/checkpoint_5 was made after 5 steps; steps: 4 cannot be fewer"
    assert refusal(place, write_config, ["steps=5"]) is None
    assert refusal(place, write_config, ["steps=4"], progress=Progress(sft_step=9, step=4)) is None


CHANGED = {
    "learning_rate=1e-5": "learning_rate: 0.001, and this run asks for learning_rate: 1e-05",
    "sft.steps=3": "sft.steps: 0, and this run asks for sft.steps: 3",
    "rewards.giou=2": "rewards.giou: 1.0, and this run asks for rewards.giou: 2.0",
    "lora.targets=[q_proj]": "and this run asks for lora.targets: ['q_proj']",
    "precision=bf16": "precision: fp32, and this run asks for precision: bf16",
    "eval_limit=2": "eval_limit: 0, and this run asks for eval_limit: 2",
    "eval_temperature=0.5": "eval_temperature: 0.0, and this run asks for eval_temperature: 0.5",
}


@pytest.mark.parametrize("change", CHANGED)
def test_other_settings(place, write_config, change):
    said = refusal(place, write_config, [change])
    assert said.startswith(f"resume: {place}/checkpoint_5 was made with ")
    assert f"{CHANGED[change]}; go back to that, or choose another output_dir" in said


def test_settings_of_other_versions(place, write_config):
    """One that came later had its default; one that is not known any more matters, unless it is free."""
    marks = fingerprints(load_config(write_config(place)), [])["settings"]
    for key in ("max_side", "clip_eps"):
        older = {"settings": {name: value for name, value in marks.items() if name != key}}
        said = refusal(place, write_config, marks=older)
        if key == "clip_eps":  # is at its default
            assert said is None
        else:
            assert "with max_side: 336, and this run asks for max_side: 56;" in said
    said = refusal(place, write_config, marks={"settings": {**marks, "entropy": 3, "threads": 9}})
    assert "with entropy: 3, and this run asks for entropy: unknown;" in said
    two = refusal(place, write_config, ["seed=1", "max_side=84"])
    assert "with seed: 0, max_side: 56, and this run asks for seed: 1, max_side: 84;" in two


def test_a_reward_of_ones_own_that_was_added(place, write_config):
    """Also with weight 0: a run's lines in metrics.jsonl hold the same terms."""
    name = f"rewards.{Path(__file__).parent.parent.parent}/examples/viou.py:viou"
    said = refusal(place, write_config, [f"{name}=0"])
    assert f"was made with {name}: unknown, " in said and f"and this run asks for {name}: 0.0, " in said


def test_other_model_data_or_format(place, write_config, checkpoints, world, tmp_path):
    other = checkpoints["qwen2_vl"]
    said = refusal(place, write_config, [f"model={other}"])
    assert said.startswith(f"resume: {place}/checkpoint_5 was made from another model than {other} is now; ")
    hub = refusal(place, write_config, ["model=Qwen/Qwen2.5-VL-7B-Instruct"])
    assert "another model than Qwen/Qwen2.5-VL-7B-Instruct" in hub
    first, other = (load_config(write_config(place), [f"model=Qwen/{name}"]) for name in ("A", "B"))
    assert fingerprints(first, [])["model"] != fingerprints(other, [])["model"]
    said = refusal(place, write_config, format=2)
    assert said.startswith(f"resume: {place}/checkpoint_5 was made by a newer version of this program; ")
    records = json.loads((world / "all.json").read_text())
    records["1.y4m"]["caption"] += " again"
    (tmp_path / "all.json").write_text(json.dumps(records))
    now, there = tmp_path / "all.json", world / "all.json"
    for split, files in {"train": f"{now} and {there}", "eval": f"{there} and {now}"}.items():
        said = refusal(place, write_config, [f"{split}_annotations={now}"])
        made = f"resume: {place}/checkpoint_5 was made with other sentences or boxes than are in {files} now"
        assert said == f"{made}; go back to that, or choose another output_dir"


def test_the_mark_of_the_data(world, write_config, place):
    """Its order, sentences, spans and boxes; not where the videos are."""
    config = load_config(write_config(place))
    samples = load_samples(config.dataset, config.train_annotations, config.videos)[0]
    first, *rest = samples

    def mark(*changed):
        return fingerprints(config, [*changed])["data"]

    boxes = first.boxes.array.copy()
    boxes[-1, 2] = 0.123
    others = [
        mark(*rest, first),
        mark(*rest),
        mark(dataclasses.replace(first, boxes=Track(first.boxes.first, boxes)), *rest),
        mark(dataclasses.replace(first, boxes=Track(first.boxes.first + 1, first.boxes.array)), *rest),
        mark(dataclasses.replace(first, stop_frame=first.stop_frame - 1), *rest),
        mark(dataclasses.replace(first, sentence="x"), *rest),
    ]
    assert len({mark(*samples), *others}) == 7
    assert mark(dataclasses.replace(first, video="/elsewhere/0.y4m"), *rest) == mark(*samples)
