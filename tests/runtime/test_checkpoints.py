"""Checkpoints: saved on some ranks and loaded on others, full disks, kills, other runs."""

import contextlib
import dataclasses
import json
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from tiny_runs import contents, names

from config import Config, ConfigError, load_config
from evaluate import load_split
from qwen.checkpoint import load_policy
from runtime import checkpoints, distributed
from runtime.checkpoints import Progress
from runtime.files import UserError
from runtime.fingerprints import MAY_CHANGE, fingerprints
from samples import Track

PRINTS = {"settings": {}, "model": "m", "data": "d"}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def new_policy(base):
    """A policy, sharded where there are ranks, and its optimiser."""
    policy = load_policy(str(base))
    if distributed.init()[1] > 1:
        distributed.shard(policy.model, policy.blocks, torch.float32)
    return policy, torch.optim.AdamW(policy.model.parameters(), lr=1e-3, weight_decay=0.1)


def step(policy, optimizer, n):
    """With a real loss, on this rank's own text, that leaves the vision tower out."""
    ids = torch.arange(10 * n, 10 * n + 8)[None] + distributed.init()[0]
    policy.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step_of_all(policy, optimizer, n):
    """With a gradient for every parameter, which depends on its value and n alone."""
    for p in policy.model.parameters():
        p.grad = p.detach() * 3 + n
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def tensors(policy, optimizer):
    """(name, part) -> whole tensor: the weights and Adam's state, gathered by none of the code under test."""
    found = {}
    for name, p in policy.model.named_parameters():
        for part, value in {"weight": p.detach(), **optimizer.state.get(p, {})}.items():
            found[name, part] = getattr(value, "full_tensor", value.clone)().clone()
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def base(checkpoints):
    return checkpoints["qwen2_5_vl"]


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(folder of a checkpoint that one process wrote after two steps, what is in it). To be read only."""
    run = tmp_path_factory.mktemp("trained")
    policy, optimizer = new_policy(base)
    for n in range(2):
        step_of_all(policy, optimizer, n)
    checkpoints.save(run / "checkpoint_2", policy, optimizer, Progress(step=2), PRINTS)
    return run / "checkpoint_2", tensors(policy, optimizer)


@pytest.fixture
def another_base(checkpoints):
    return checkpoints["qwen3_vl"]


def load_and_save(base, source, target):
    policy, optimizer = new_policy(base)
    checkpoints.load(source, policy.model, optimizer)
    found = tensors(policy, optimizer)
    checkpoints.save(target, policy, optimizer, Progress(step=2), PRINTS)
    reference = load_policy(str(base), torch.bfloat16)
    reference.model.requires_grad_(False)
    distributed.shard(reference.model, reference.blocks, torch.bfloat16)
    checkpoints.load_weights(source, reference.model)
    for name, p in reference.model.named_parameters():
        assert torch.equal(p.full_tensor(), found[name, "weight"].bfloat16())
    return found if distributed.init()[0] == 0 else None


def test_written_on_some_ranks_read_on_others(trained, base, tmp_path):
    """1 -> 2 -> 3 -> 1, and after each the same bits as in the process that trained; in the frozen reference
    the same, rounded."""
    source, expected = trained
    for ranks in (2, 3):
        target = tmp_path / f"checkpoint_{ranks}"
        assert same(on_ranks(ranks, load_and_save, base, source, target)[0], expected)
        assert len(list((target / "state").glob("*.safetensors"))) == ranks
        source = target
    policy, optimizer = new_policy(base)
    checkpoints.load(source, policy.model, optimizer)
    assert same(tensors(policy, optimizer), expected)
    exported = load_policy(str(source)).model.state_dict()
    assert all(torch.equal(exported[name], p) for name, p in policy.model.state_dict().items())


def train_with_pauses(base, run):
    """Whether three steps end as three with checkpoints between, the first before any step. The vision tower
    has no Adam state when it is saved, and gets its first one in the last step."""
    ends = []
    for pause in (False, True):
        policy, optimizer = new_policy(base)
        for n in range(3):
            if pause:
                checkpoints.save(run / f"checkpoint_{n}", policy, optimizer, Progress(step=n), PRINTS)
                assert n or not optimizer.state  # saving is no step
                policy, optimizer = new_policy(base)
                step_of_all(policy, optimizer, 5)  # of which nothing must be left
                checkpoints.load(run / f"checkpoint_{n}", policy.model, optimizer)
            step(policy, optimizer, n)
        step_of_all(policy, optimizer, 3)
        ends.append(tensors(policy, optimizer))
    return same(*ends)


@pytest.mark.parametrize("ranks", [1, 2])
def test_pauses_change_nothing(base, run, ranks):
    assert on_ranks(ranks, train_with_pauses, base, run) == [True] * ranks


def test_only_what_is_trained_is_kept(base, run):
    """No tied weight twice, none that is frozen under its second name; loading leaves the rest alone."""
    policy, optimizer = new_policy(base)
    names = {name for name, _ in policy.model.named_parameters()}
    for n, frozen in enumerate([(), ("visual", "embed_tokens")]):
        policy.model.model.visual.requires_grad_("visual" not in frozen)
        policy.model.lm_head.requires_grad_("embed_tokens" not in frozen)
        checkpoints.save(run / f"checkpoint_{n}", policy, optimizer, Progress(step=n), PRINTS)
        kept = {name for name in names if not any(word in name for word in frozen)}
        parts = {f"adam.{name}.{part}" for name in kept for part in ("exp_avg", "exp_avg_sq", "step")}
        saved = load_file(run / f"checkpoint_{n}/state/0.safetensors")
        assert saved.keys() == {f"model.{name}" for name in kept} | parts and len(kept) > 10
    other, _ = new_policy(base)
    with torch.no_grad():
        for p in other.model.parameters():
            p.fill_(7)
    checkpoints.load_weights(run / "checkpoint_1", other.model)
    assert {name for name, p in other.model.named_parameters() if (p == 7).all()} == names - kept


def test_progress_and_lengths_of_the_logs(base, run, recwarn, capfd):
    (run / "metrics.jsonl").write_bytes(b"12345\n")
    progress = Progress(sft_step=3, step=7, best={"step": 5, "m_vIoU": 0.25})
    checkpoints.save(run / "checkpoint_7", *new_policy(base), progress, PRINTS)
    found = checkpoints.last_checkpoint(run)
    assert found.folder == run / "checkpoint_7" and found.fingerprints == PRINTS
    assert found.progress == dataclasses.replace(progress, positions={"metrics.jsonl": 6})
    checkpoints.note_best(run / "checkpoint_7", {"step": 7, "m_vIoU": 0.5})
    assert checkpoints.last_checkpoint(run).progress.best == {"step": 7, "m_vIoU": 0.5}
    assert names(run) == {"metrics.jsonl", "checkpoint_7"}
    assert not recwarn.list and capfd.readouterr() == ("", "")


def save_on_a_full_disk(base, run, full, limit):
    """What this rank says where on one rank (full) no file can grow beyond the limit (bytes)."""
    policy, optimizer = new_policy(base)
    if distributed.init()[0] == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with pytest.raises(UserError) as caught:
        checkpoints.save(run / "checkpoint_2", policy, optimizer, Progress(step=2), PRINTS)
    return str(caught.value)


@pytest.mark.parametrize(("ranks", "full", "limit"), [(1, 0, 8), (1, 0, 3e5), (2, 0, 2e4), (2, 1, 2e4)])
def test_full_disk(trained, base, run, ranks, full, limit):
    """In the export, in DCP's file, of either rank: all ranks say so, and what was there stays."""
    shutil.copytree(trained[0], run / "checkpoint_2")
    before = contents(run)
    for said in on_ranks(ranks, save_on_a_full_disk, base, run, full, int(limit)):
        assert said.startswith(f"{run}/checkpoint_2: cannot be written (") and "\n" not in said
        assert "); free some space, " in said
    assert contents(run) == before


def plain(run, name, sft_step=0, step=0, weights=b"weights"):
    """A checkpoint as last_checkpoint sees it, written by hand."""
    (run / name / "state").mkdir(parents=True)
    (run / name / "model.safetensors").write_bytes(weights)
    checkpoints._write_progress(run / name, dataclasses.asdict(Progress(sft_step, step)), PRINTS, {})


def test_the_furthest_one(run):
    assert checkpoints.last_checkpoint(run) is None and checkpoints.last_checkpoint(run / "none") is None
    order = {"checkpoint_sft_2": (2, 0), "checkpoint_sft_10": (10, 0), "checkpoint_2": (10, 2)}
    order |= {"checkpoint_10": (10, 10), "checkpoint_12": (10, 12), "checkpoint": (10, 12)}
    for name, steps in order.items():  # checkpoint_12: of a signal in the last step
        plain(run, name, *steps)
        assert checkpoints.last_checkpoint(run).folder == run / name
    for name in ("checkpoint_40.mine", "best_40", "best_41.old", "checkpoint_40.tmp"):
        plain(run, name, 10, 40)  # no checkpoints
    shutil.rmtree(run / "checkpoint_12/state")  # the user needed space
    assert checkpoints.last_checkpoint(run).folder == run / "checkpoint"


EDITS = [None, [], 0, "x", {}, {"progress": {}}]
EDITS += [("step", v) for v in (None, "4", 5, -1, 4.0, True, 10**400, [4])]
EDITS += [("best", {"step": 4}), ("positions", None), ("positions", {"metrics.jsonl": 9}), ("steps", 4)]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_a_record_that_was_changed(run, edit, capsys):
    """The checkpoint before is used, and it is said why; without one before, that is the error."""
    for n in (2, 4):
        plain(run, f"checkpoint_{n}", step=n)
    path = run / "checkpoint_4/state/progress.json"
    record = json.loads(path.read_text())
    if isinstance(edit, tuple):
        record["progress"][edit[0]], edit = edit[1], record
    path.write_text(json.dumps(edit))
    assert checkpoints.last_checkpoint(run).folder == run / "checkpoint_2"
    why = f"{path}: is damaged, or of an earlier version of this program"
    assert capsys.readouterr().err == f"not used: {why}\n"
    shutil.rmtree(run / "checkpoint_2")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(") as caught:
        checkpoints.last_checkpoint(run)
    assert why in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("edit", [e for e in EDITS if isinstance(e, tuple) and e[0] != "best"][:-2], ids=str)
def test_a_record_that_was_forged(run, edit):
    """The same with a right checksum."""
    for n in (2, 4):
        plain(run, f"checkpoint_{n}", step=n)
    progress = dataclasses.asdict(Progress(step=4)) | {edit[0]: edit[1]}
    checkpoints._write_progress(run / "checkpoint_4", progress, PRINTS, {})
    legal = type(edit[1]) is int and edit[1] >= 0
    assert checkpoints.last_checkpoint(run).folder == run / f"checkpoint_{4 if legal else 2}"


def test_the_state_of_another_model(trained, another_base):
    """With right checksums."""
    policy, optimizer = new_policy(another_base)
    with pytest.raises(UserError, match=r"state: is of another model .* choose another output_dir"):
        checkpoints.load(trained[0], policy.model, optimizer)


def flip(path):
    """64 bytes in the middle of a file become others."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(byte ^ 255 for byte in data[middle : middle + 64])
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": Path.unlink,
    "added": lambda path: shutil.copy(path, path.with_name("more.safetensors")),
}


def find_last(run):
    found = checkpoints.last_checkpoint(run)
    return found and found.folder.name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state(trained, base, run, damage, ranks):
    """The checkpoint before is used, on all ranks; where the state must be read, it is one line."""
    for name in ("checkpoint_2", "checkpoint_3"):
        shutil.copytree(trained[0], run / name)
    record = checkpoints._read_checkpoint(run / "checkpoint_3/state/progress.json")
    progress = dataclasses.asdict(Progress(step=3))
    checkpoints._write_progress(run / "checkpoint_3", progress, PRINTS, record.checksums)
    assert on_ranks(ranks, find_last, run) == ["checkpoint_3"] * ranks
    (file,) = (run / "checkpoint_3/state").glob("*.safetensors")
    DAMAGES[damage](file)
    assert on_ranks(ranks, find_last, run) == ["checkpoint_2"] * ranks
    with pytest.raises(UserError, match=r"checkpoint_3/state: .* missing or damaged; choose") as caught:
        checkpoints.load_weights(run / "checkpoint_3", load_policy(str(base)).model)
    assert "\n" not in str(caught.value)


def test_a_damaged_one_is_set_aside(run):
    """Else it would count as the newest, and `prune` would remove the good one that is written next."""
    for n in (2, 4):
        plain(run, f"checkpoint_{n}", step=n)
    (run / "checkpoint_4/state/0.safetensors").write_bytes(b"added")
    checkpoints.tidy(run, checkpoints.last_checkpoint(run))
    assert names(run) == {"checkpoint_2", "checkpoint_4.damaged"}
    plain(run, "checkpoint_6", step=6)
    (run / "checkpoint_6/state/progress.json").write_text("[]")
    checkpoints.tidy(run, checkpoints.last_checkpoint(run))
    plain(run, "checkpoint_3", step=3)
    checkpoints.prune(run, 1)
    assert names(run) == {"checkpoint_3", "checkpoint_4.damaged", "checkpoint_6.damaged"}
    assert checkpoints.last_checkpoint(run).progress.step == 3


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(trained, base, run):
    """A stranger's checkpoint: pickles under every name that torch or DCP would load, and a right record."""
    folder, seen = shutil.copytree(trained[0], run / "checkpoint_2"), run / "seen"
    names = (
        "state/.metadata",
        "state/__0_0.distcp",
        "optimizer.pt",
        "pytorch_model.bin",
        "training_args.bin",
    )
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Payload(seen)))
    pickle.loads((folder / names[0]).read_bytes())
    seen.unlink()  # the payload works
    policy, optimizer = new_policy(base)
    assert checkpoints.last_checkpoint(run).folder == folder
    checkpoints.load(folder, policy.model, optimizer)
    checkpoints.load_weights(folder, policy.model)
    load_policy(str(folder))
    assert same(tensors(policy, optimizer), trained[1]) and not seen.exists()


# What a kill leaves of NAME -> which of it NAME is afterwards: while it is written, the first time or again;
# between the two renames; while what was there is removed.
LEFT = {"tmp": None, "name tmp": "name", "old tmp": "old", "name old": "name", "old": "old"}


@pytest.mark.parametrize("name", ["checkpoint_4", "checkpoint_sft_4", "checkpoint", "best_4"])
@pytest.mark.parametrize("left", LEFT)
def test_what_a_kill_leaves(run, name, left):
    """The checkpoint that is found is the one that `tidy` leaves; what is none stays as it is."""
    for other in ("checkpoint_4.mine", "my_checkpoint_4.old", "best.old", "pictures.tmp"):
        plain(run, other)
    before = contents(run)
    for part in left.split():
        plain(run, name if part == "name" else f"{name}.{part}", step=4, weights=part.encode())
    found = checkpoints.last_checkpoint(run)
    assert bool(found) == (LEFT[left] is not None and name != "best_4")
    checkpoints.tidy(run, found)
    if LEFT[left]:
        assert (run / name / "model.safetensors").read_bytes() == LEFT[left].encode()
        assert found is None or found.folder.with_suffix("") == run / name
        shutil.rmtree(run / name)
    assert contents(run) == before


@pytest.mark.parametrize(("kill", "whole"), [(0, 0), (1, 0), (2, 1)])
def test_a_kill_at_any_rename(base, run, monkeypatch, kill, whole):
    """A checkpoint of the same name is replaced: before and after each rename one of the two is whole."""
    policy, optimizer = new_policy(base)
    rename, renames = Path.rename, []

    def until_killed(path, target):
        if path.name.startswith("checkpoint"):  # DCP renames, too
            renames.append(path.name)
            if len(renames) > kill:
                raise KeyboardInterrupt  # which nothing catches
        return rename(path, target)

    def save(n):
        checkpoints.save(run / "checkpoint", policy, optimizer, Progress(best={"n": n}), PRINTS)

    save(0)
    monkeypatch.setattr(Path, "rename", until_killed)
    with contextlib.suppress(KeyboardInterrupt):
        save(1)
    monkeypatch.undo()
    assert checkpoints.last_checkpoint(run).progress.best == {"n": whole}
    save(2)  # also over what the kill left
    assert checkpoints.last_checkpoint(run).progress.best == {"n": 2} and names(run) == {"checkpoint"}


def test_prune(run, monkeypatch):
    for n in (2, 4):
        plain(run, f"checkpoint_sft_{n}", n, 0)
    for n in (9, 10, 11):
        plain(run, f"checkpoint_{n}", 4, n)
    plain(run, "checkpoint", 4, 8)
    plain(run, "best_3", 4, 3)
    stay = {"checkpoint_sft_4", "checkpoint", "best_3"}
    checkpoints.prune(run, 4, spare=[run / "checkpoint_sft_4"])
    assert names(run) == {*stay, "checkpoint_9", "checkpoint_10", "checkpoint_11"}
    checkpoints.prune(run, 2, spare=[run / "checkpoint_sft_4"])
    assert names(run) == {*stay, "checkpoint_10", "checkpoint_11"}
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill: what is left is no checkpoint
    checkpoints.prune(run, 1, spare=[run / "checkpoint_sft_4"])
    assert names(run) == {*stay, "checkpoint_10.tmp", "checkpoint_11"}


def test_logs_are_cut_back(run):
    metrics, rollouts = run / "metrics.jsonl", run / "rollouts.jsonl"
    metrics.write_bytes(b"1\n2\n3\n")
    rollouts.write_bytes(b"11\n22\n")
    checkpoints.cut_back(run, Progress(positions={"metrics.jsonl": 4, "rollouts.jsonl": 6}))
    assert (metrics.read_bytes(), rollouts.read_bytes()) == (b"1\n2\n", b"11\n22\n")
    with pytest.raises(UserError, match=r"rollouts.jsonl: is shorter than when"):
        checkpoints.cut_back(run, Progress(positions={"metrics.jsonl": 2, "rollouts.jsonl": 7}))
    assert metrics.read_bytes() == b"1\n2\n"
    checkpoints.cut_back(run, Progress(positions={"metrics.jsonl": 2}))  # there were no rollouts yet
    assert (metrics.read_bytes(), rollouts.read_bytes()) == (b"1\n", b"")


def refusal(run, write_config, changes=(), **fingerprint):
    """What refuse_other says to a run with these changes, of a checkpoint of the run without them."""
    path = write_config(run, steps=5)
    configs = [load_config(path), load_config(path, changes)]
    then, now = (
        fingerprints(c, [s for f in (c.train_annotations, c.eval_annotations) for s in load_split(c, f)[0]])
        for c in configs
    )
    found = checkpoints.Checkpoint(run / "checkpoint_5", Progress(step=5), then | fingerprint, {})
    try:
        checkpoints.refuse_other(found, configs[1], now)
    except ConfigError as error:
        assert str(error).startswith(f"resume: {run}/checkpoint_5 was made ") and "\n" not in str(error)
        return str(error)


def test_the_same_run_resumes(run, write_config, world, base, tmp_path):
    """Also with settings that may change, data elsewhere and a copy of the model."""
    shutil.copytree(world, tmp_path / "world")
    shutil.copytree(base, tmp_path / "model")
    changes = "steps=9 on_bad_video=skip sync_gradients=every micro_batch=1 log_to=wandb keep_checkpoints=7"
    changes += f" eval_every=1 model={tmp_path}/model videos={tmp_path}/world output_dir={tmp_path}"
    changes += "".join(f" {split}_annotations={tmp_path}/world/all.json" for split in ("train", "eval"))
    assert refusal(run, write_config, changes.split()) is None
    assert {field.name for field in dataclasses.fields(Config)} >= MAY_CHANGE


CHANGED = {
    "steps=4": "after 5 steps; steps: 4 cannot be fewer",
    "learning_rate=1e-5": "with learning_rate: 0.001; this run has learning_rate: 1e-05; go back",
    "rewards.giou=2": "with rewards.giou: 1.0; this run has rewards.giou: 2.0",
    "seed=1 precision=bf16": "with seed: 0, precision: fp32; this run has seed: 1, precision: bf16",
    "rewards.{root}/examples/viou.py:viou=0": "viou.py:viou: None, ",
    "model={qwen2_vl}": "with weights of the model: ",
}


@pytest.mark.parametrize("changes", CHANGED)
def test_another_run(run, write_config, checkpoints, changes):
    root = Path(__file__).resolve().parent.parent.parent
    changed = changes.format(root=root, **checkpoints).split()
    assert CHANGED[changes] in refusal(run, write_config, changed)


def test_settings_of_other_versions(run, write_config):
    """A setting that is newer than the checkpoint had its default; one that is gone matters."""
    settings = fingerprints(load_config(write_config(run)), [])["settings"]
    without = {key: {k: v for k, v in settings.items() if k != key} for key in ("clip_eps", "max_side")}
    assert refusal(run, write_config, settings=without["clip_eps"]) is None
    said = refusal(run, write_config, settings={**without["max_side"], "entropy": 3})
    assert "with max_side: 336, entropy: 3; this run has max_side: 56, entropy: None;" in said


def test_the_fingerprint_of_the_data(world, write_config, run):
    """Its order, sentences, spans and boxes; not where the videos are."""
    config = load_config(write_config(run))
    first, *rest = load_split(config, config.train_annotations)[0]

    def fingerprint(*samples):
        return fingerprints(config, [*samples])["data"]

    boxes = first.boxes.array.copy()
    boxes[-1, 2] = 0.123
    tracks = Track(first.boxes.first, boxes), Track(first.boxes.first + 1, first.boxes.array)
    changes = [{"boxes": track} for track in tracks]
    changes += [{"stop_frame": first.stop_frame - 1}, {"sentence": "x"}, {}]
    found = {fingerprint(dataclasses.replace(first, **change), *rest) for change in changes}
    assert len(found | {fingerprint(*rest, first), fingerprint(*rest)}) == 7
    moved = dataclasses.replace(first, video="/elsewhere/0.y4m")
    assert fingerprint(moved, *rest) == fingerprint(first, *rest)
