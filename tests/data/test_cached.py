"""Laws of cached references: what `embed` stores of one is what it makes of the very batches that training sees."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from indexes import make_index
from pictures import jpeg
from PIL import Image

from clipgraft import dist, lock
from clipgraft import embed as stage
from clipgraft.checkpoint import load_model, save_model
from clipgraft.config import ConfigError
from clipgraft.data import filling
from clipgraft.data.augment import augment
from clipgraft.data.cached import ReferenceCache, StoredCrops, shared_crops
from clipgraft.data.crops import cut, random_boxes
from clipgraft.data.draws import as_uniform, draw_bits
from clipgraft.data.loader import Loader
from clipgraft.data.sampler import UniformBatches, Visits
from clipgraft.data.samples import Captions, Samples
from clipgraft.data.shards import Shards, write_shards
from clipgraft.data.tokens import Tokenizer
from clipgraft.data.vocabulary import Encoder, clip_merges
from clipgraft.embed import caption_reader, embed_reference
from clipgraft.loss_settings import ReferenceSettings
from clipgraft.models.build import build, describe, normalize
from clipgraft.pretrain import pretrain
from clipgraft.recipes import AugmentationSettings
from clipgraft.references import CachedReference, OnlineReference, open_references
from clipgraft.settings import EmbedSettings, PretrainJob, ReferenceJob, ShardJob
from clipgraft.training_data import Data

N, SIZE, CROPS = 20, 16, 3
IMAGES = [jpeg(24 + i, 18 + i % 5, i, subsampling=0) for i in range(N)]
CAPTIONS = [[f"picture {row} version {k}" for k in "abc"[: 1 + row % 3]] for row in range(N)]
DRAWN = {"crop_scale": (0.3, 0.9), "flip_prob": 0.5, "color_jitter": (0.4, 0.4, 0.4, 0.1)}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch):
    """Chunks smaller than the data, of a size that does not divide it; the whole in float32."""
    monkeypatch.setattr(stage, "BATCH", 6)
    monkeypatch.setenv("CLIPGRAFT_PRECISION", "fp32")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    """Index and shards; pictures are smaller than a shard wants them, so that their bytes stay."""
    base = tmp_path_factory.mktemp("data")
    index = make_index(base, IMAGES, CAPTIONS)
    (base / "shard").mkdir()
    write_shards(ShardJob(image_size=SIZE, oversize=2.5), index, base / "shard", 1)
    return index, base / "shard"


@pytest.fixture(scope="module")
def model(tmp_path_factory, data) -> Path:
    """A reference with a vocabulary, an image size and a normalisation of its own; its weights are random."""
    folder = tmp_path_factory.mktemp("reference")
    Encoder(clip_merges()).write(folder / "merges.txt.gz")
    size = Tokenizer(folder / "merges.txt.gz").vocab_size
    vision = {"image_size": SIZE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
    text = {"context_length": 10, "vocab_size": size, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "quick_gelu": False, "custom_text": True}
    config |= {"vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(3)
    spec = describe(config)
    spec["preprocess"] |= {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25]}
    target = folder / "model"
    target.mkdir()
    save_model(target, build(config, temperature=0.05), spec, folder / "merges.txt.gz")
    return target


def job(model: Path, crops: int = CROPS, **changes) -> ReferenceJob:
    augmentation = AugmentationSettings(**DRAWN) if crops > 1 else None
    given = {"image_size": SIZE, "crops": crops, "augmentation": augmentation}
    return ReferenceJob(**{"model": str(model), **given, **changes})


def phase(model: Path, crops: int = CROPS, **changes) -> PretrainJob:
    towers = {
        "embed_dim": 24,
        "vision_cfg": {"patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"width": 32, "heads": 2, "layers": 1},
    }
    raw = {
        "name": "short",
        "image_size": SIZE,
        "text_length": 8,
        "samples_seen": 80,
        "batch_size": 4,
        "optim": {"lr": 1e-3},
        "seed": 7,
        "model": {"config": towers},
        "references": [{"model": str(model), "cached": True, "crops": crops}],
        "distillation": {"feature": 1.0},
        **DRAWN,
    }
    return PretrainJob(**{**raw, **changes})


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.fixture(scope="module", params=[1, CROPS])
def cache(request, tmp_path_factory, data, model) -> tuple[int, Path]:
    """Number of crops, and outputs of `embed`."""
    out = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "BATCH", 6)
        embed_reference(job(model, request.param), *data, out, threads=2)
    return request.param, out


def batches(data, settings, references, **changes) -> list:
    opened = Data.open(*data)
    given = {
        "image_size": settings.image_size,
        "text_length": settings.text_length,
        "crop_scale": settings.crop_scale,
        "seed": settings.seed,
        "num_steps": 20,
        "augment": True,
        "caches": [each.cache for each in references if isinstance(each, CachedReference)],
    }
    sampler = UniformBatches(N, settings.batch_size, 0)
    return list(Loader(opened.shards, opened.tokens, sampler, **{**given, **changes}))


def references_of(data, settings, cached) -> list:
    given = {"reference_0": cached, "reference_1": cached}
    return open_references(settings, 24, Data.open(*data), torch.device("cpu"), given)


def test_cached_features_are_those_of_the_reference_online_on_the_same_crops(data, model, cache):
    crops, out = cache
    whole = {"crop_scale": (1, 1), "flip_prob": 0, "color_jitter": (0, 0, 0, 0)}
    settings = phase(model, crops, **({} if crops > 1 else whole))
    (cached,) = references_of(data, settings, out)
    online = OnlineReference(
        ReferenceSettings(model=str(model)), Data.open(*data), torch.device("cpu")
    )
    assert cached.dim == online.dim == 24
    for batch in batches(data, settings, [cached]):
        pixels = augment(batch.images_BCHW, batch.uniform_BK, settings)
        with torch.no_grad():
            ours, theirs = (each.features(pixels, batch) for each in (cached, online))
        for name in ("image_BD", "text_BD"):
            # Rounding a unit row of 24 to float16 moves it by 1e-4 or so; another crop of the same picture by 1e-2.
            torch.testing.assert_close(
                getattr(ours, name), getattr(theirs, name), atol=5e-4, rtol=0
            )
            torch.testing.assert_close(getattr(ours, name).norm(dim=1), torch.ones(4))
        assert ours.scale.item() == pytest.approx(1 / 0.05, rel=1e-5)
        assert (batch.crop_B is None) == (crops == 1)


def test_every_source_sees_all_its_crops_in_as_many_visits_whatever_it_weighs():
    crops = StoredCrops(3, 0, np.ones((12, 2), np.uint32), AugmentationSettings())
    source_N = np.repeat([0, 1, 2], 4)
    visits = Visits(12, 0, source_N, np.array([1.0, 2.0, 0.5]))
    shown = [[] for _ in range(12)]
    for epoch in range(12):
        drawn = visits.of_epoch(epoch)
        numbers = crops.choose(3, drawn.rows_V, drawn.visit_V)
        for row, number in zip(drawn.rows_V, numbers, strict=True):
            shown[row].append(int(number))
    assert [len(each) for each in shown] == [12] * 4 + [24] * 4 + [6] * 4
    assert all(set(each[i : i + 3]) == {0, 1, 2} for each in shown for i in range(0, len(each), 3))


def test_crops_of_a_picture_differ_by_more_than_the_tolerance(cache):
    crops, out = cache
    image_NAD = np.load(out / "image.npy").astype(np.float32)
    assert image_NAD.shape == (N, crops, 24) and np.load(out / "text.npy").dtype == np.float16
    if crops > 1:
        assert np.median(np.abs(image_NAD[:, 0] - image_NAD[:, 1]).max(-1)) > 5e-3


def test_a_visit_shows_the_stored_crop_of_the_picture(data, model, tmp_path):
    """Against boxes and pixels that are computed here, from the pictures themselves."""
    out = folder(tmp_path / "out")
    embed_reference(job(model), *data, out)
    settings = phase(model)
    for batch in batches(data, settings, references_of(data, settings, out))[:5]:
        for image, uniform, row, crop in zip(
            batch.images_BCHW, batch.uniform_BK, batch.rows_B, batch.crop_B, strict=True
        ):
            picture = np.asarray(Image.open(io.BytesIO(IMAGES[row])))
            words = draw_bits(0, np.array([row]), int(crop), 13)
            height, width = np.array([picture.shape[:2]]).T
            (box,) = random_boxes(width, height, as_uniform(words[:, 2:6]), DRAWN["crop_scale"])
            expected = np.empty((SIZE, SIZE, 3), np.uint8)
            cut(picture, tuple(box.tolist()), expected)
            assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 0.5
            np.testing.assert_allclose(uniform, as_uniform(words[0, 6:13]), atol=1e-6)


def test_pictures_are_embedded_in_true_float32(data, model, tmp_path):
    """Not in TF32, which is cuDNN's default for the convolution that makes patches."""
    assert torch.backends.cudnn.allow_tf32
    seen = []

    def look(module, _):
        if isinstance(module, torch.nn.Conv2d):
            seen.append(torch.backends.cudnn.allow_tf32)

    with torch.nn.modules.module.register_module_forward_pre_hook(look):
        embed_reference(job(model), *data, folder(tmp_path / "crops"))
        num_crops = len(seen)
        stage.embed(EmbedSettings(), model, *data, folder(tmp_path / "whole"))
    assert 0 < num_crops < len(seen) and not any(seen)
    assert torch.backends.cudnn.allow_tf32


def test_shards_of_another_size_show_the_same_part_of_the_picture(data, model, tmp_path):
    out, small = folder(tmp_path / "out"), folder(tmp_path / "small")
    embed_reference(job(model), *data, out)
    write_shards(ShardJob(image_size=8, oversize=1.0), data[0], small, 1)
    settings, boxes = phase(model, image_size=8), []

    class Recorded(Shards):
        def squares(self, rows_B, box_B4, out_BHWC):
            boxes.append(box_B4)

    for shard in (data[1], small):
        opened = Data.open(data[0], shard)
        (reference,) = references_of((data[0], shard), settings, out)
        loader = Loader(
            Recorded.open(shard),
            opened.tokens,
            UniformBatches(N, 4, 0),
            image_size=8,
            text_length=4,
            crop_scale=settings.crop_scale,
            seed=1,
            num_steps=5,
            caches=[reference.cache],
        )
        list(loader)
    assert len(boxes) == 10
    np.testing.assert_array_equal(boxes[:5], boxes[5:])
    widths = [Shards.open(shard).sizes(np.arange(N))[0] for shard in (data[1], small)]
    assert (widths[0] != widths[1]).all()


def test_in_as_many_visits_every_crop_is_shown_once_and_in_other_orders():
    crops = StoredCrops(5, 0, np.ones((9, 2), np.uint32), AugmentationSettings())
    rows = np.arange(9)
    shown_VB = np.stack([crops.choose(3, rows, np.full(9, visit)) for visit in range(40)])
    for first in range(0, 40, 5):
        assert (np.sort(shown_VB[first : first + 5], axis=0) == np.arange(5)[:, None]).all()
    assert len({tuple(order) for order in shown_VB.T}) == 9
    assert (shown_VB[:5] != shown_VB[5:10]).any() and (
        crops.choose(4, rows, 0) != shown_VB[0]
    ).any()


def test_every_caption_has_a_row_and_the_drawn_one_is_read(data, model, cache):
    crops, out = cache
    texts = [text for several in CAPTIONS for text in several]
    loaded = load_model(model)
    ids_CL = torch.from_numpy(Tokenizer(loaded.tokenizer).encode_batch(texts, 10))
    with torch.no_grad():
        text_CD = torch.cat([loaded.model.eval().encode_text(ids[None]) for ids in ids_CL])
    text_CD = F.normalize(text_CD, dim=1)
    stored_CD = torch.from_numpy(np.load(out / "text.npy")).float()
    torch.testing.assert_close(stored_CD, text_CD, atol=5e-4, rtol=0)
    settings, seen = phase(model, crops), set()
    own = Tokenizer(Data.open(*data).tokens.tokenizer)
    for batch in batches(data, settings, references_of(data, settings, out), num_steps=60):
        for row, caption, ids, read in zip(
            batch.rows_B, batch.captions_B, batch.text_BL, batch.cached_BE, strict=True
        ):
            assert texts[caption] in CAPTIONS[row]
            assert own.encode_batch([texts[caption]], 8)[0].tolist() == ids.tolist()
            assert torch.equal(read[24:].float(), stored_CD[caption])
            seen.add(int(caption))
    assert seen == set(range(len(texts)))


def test_a_reference_with_the_vocabulary_of_the_data_reads_its_tokens_as_its_own_tokenizer_would(
    data, tmp_path
):
    opened = Data.open(*data)
    (tmp_path / "same").mkdir()
    copy = tmp_path / "same" / opened.tokens.tokenizer.name
    copy.write_bytes(opened.tokens.tokenizer.read_bytes())
    own = Tokenizer(copy)
    for reader in (
        caption_reader(opened, copy, 6),
        caption_reader(opened, lambda texts: torch.from_numpy(own.encode_batch(texts, 6)), 77),
    ):
        for first, stop in ((0, N), (4, 11)):
            texts = [text for several in CAPTIONS[first:stop] for text in several]
            assert reader(first, stop).tolist() == own.encode_batch(texts, 6).tolist()


def test_the_picture_of_one_crop_is_that_of_evaluation(data, model, tmp_path):
    """The middle, or the whole where the reference squashes."""
    loaded, seen = load_model(model), {}
    shards = Shards.open(data[1])
    for mode in ("shortest", "squash"):
        target, out = folder(tmp_path / mode), folder(tmp_path / f"{mode}.out")
        spec = {**loaded.spec, "preprocess": {**loaded.spec["preprocess"], "resize_mode": mode}}
        save_model(target, loaded.model, spec, loaded.tokenizer)
        embed_reference(job(target, 1), *data, out)
        seen[mode] = np.load(out / "image.npy")[:, 0].astype(np.float32)
        about = spec["preprocess"]
        for row in range(N):
            pixels = np.asarray(Image.open(io.BytesIO(shards.jpeg(row))))
            height, width = pixels.shape[:2]
            left, side = (width - height) / 2, height  # all are wider than high
            box = (
                (left / width, 0, (left + side) / width, 1) if mode == "shortest" else (0, 0, 1, 1)
            )
            square = np.empty((SIZE, SIZE, 3), np.uint8)
            cut(pixels, box, square)
            image = torch.from_numpy(square).permute(2, 0, 1)[None]
            with torch.no_grad():
                images = normalize(image, about["mean"], about["std"])
                expected = loaded.model.eval().encode_image(images, normalize=True)[0]
            np.testing.assert_allclose(seen[mode][row], expected, atol=2e-2)
    assert np.abs(seen["shortest"] - seen["squash"]).max() > 2e-2


@pytest.mark.parametrize("crops", [1, CROPS])
def test_threads_and_a_crash_change_nothing(data, model, tmp_path, monkeypatch, crops):
    monkeypatch.setattr(filling, "SAVE_SECONDS", -1.0)
    outs = [folder(tmp_path / name) for name in ("whole", "threads", "resumed", "again")]
    embed_reference(job(model, crops), *data, outs[0])
    embed_reference(job(model, crops), *data, outs[1], threads=3)
    mark, calls = filling.Filling.mark, []

    def crash_at_the_third(self, chunk):
        calls.append(chunk)
        mark(self, chunk)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(filling.Filling, "mark", crash_at_the_third)
    resume = {"resume": tmp_path / "resume", "tag": "a"}
    with pytest.raises(KeyboardInterrupt):
        embed_reference(job(model, crops), *data, outs[2], **resume)
    assert not list(outs[2].iterdir())
    embed_reference(job(model, crops), *data, outs[2], **resume)
    embed_reference(
        job(model, crops), *data, outs[3], **resume
    )  # killed before its manifest was there
    assert calls == [0, 1, 2, 3]  # four chunks of six, none twice
    for out in outs[1:]:
        assert sorted(path.name for path in out.iterdir()) == sorted(
            path.name for path in outs[0].iterdir()
        )
        for path in outs[0].iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_work_of_another_tag_is_not_continued(data, model, tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "SAVE_SECONDS", -1.0)
    world = dist.World(0, 1, torch.device("cpu"))
    shapes = {"a.npy": (4, 2)}
    first = filling.Filling(tmp_path / "x", "one", shapes, 2, world)
    first.write("a.npy", 0, np.ones((2, 2)))
    first.mark(0)
    again = filling.Filling(tmp_path / "x", "one", shapes, 2, world)
    assert again.own_todo.tolist() == [1] and again.num_done == 1
    for changed in ({"tag": "two"}, {"shapes": {"a.npy": (4, 3)}}):
        given = {"tag": "one", "shapes": shapes, **changed}
        other = filling.Filling(tmp_path / "x", given["tag"], given["shapes"], 2, world)
        assert other.own_todo.tolist() == [0, 1]
        assert not np.load(tmp_path / "x/a.npy").any()


SOME = """
import os, signal, sys
from pathlib import Path
from clipgraft import embed
from clipgraft.data import filling
from clipgraft.settings import ReferenceJob
embed.BATCH, filling.SAVE_SECONDS = 6, -1.0
mark, number = filling.Filling.mark, int(sys.argv[5])

def count(self, chunk):
    global number
    number -= 1
    os.write(1, f"chunk {chunk}\\n".encode())  # whole, beside what the other process writes
    mark(self, chunk)
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)

filling.Filling.mark = count
settings = ReferenceJob.model_validate_json(sys.argv[1])
index, shard, out, resume = map(Path, [*sys.argv[2:5], sys.argv[6]])
embed.embed_reference(settings, index, shard, out, threads=2, resume=resume, tag="a")
"""


def test_two_processes_end_what_one_began_before_it_was_killed_as_if_nothing_were(
    data, model, tmp_path
):
    one, two, script = folder(tmp_path / "one"), folder(tmp_path / "two"), tmp_path / "some.py"
    embed_reference(job(model), *data, one)
    script.write_text(SOME)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    chunks = []
    for words, num_chunks, code in (([], "1", -9), (torchrun, "0", 0)):
        command = [sys.executable, *words, script, job(model).model_dump_json(), *map(str, data)]
        command += [str(two), num_chunks, str(tmp_path / "resume")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        chunks.append(sorted(line for line in done.stdout.splitlines() if "chunk" in line))
    assert chunks == [["chunk 0"], ["chunk 1", "chunk 2", "chunk 3"]]
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for path in one.iterdir():
        assert (two / path.name).read_bytes() == path.read_bytes(), path.name


def test_jobs_that_share_the_work_leave_the_last_one_only_what_none_of_them_did(
    data, model, tmp_path, monkeypatch
):
    one, parts = folder(tmp_path / "one"), folder(tmp_path / "parts")
    embed_reference(job(model), *data, one)
    filled = []

    def mark(self, chunk, original=filling.Filling.mark):
        filled.append(chunk)
        original(self, chunk)

    monkeypatch.setattr(filling.Filling, "mark", mark)
    by_job = {"2-of-3": [2], "0-of-3": [0, 3], "": [1]}  # job 1 never ran
    for part, chunks in by_job.items():
        monkeypatch.setenv("CLIPGRAFT_PART", part)
        embed_reference(job(model), *data, parts, resume=tmp_path / "resume", tag="a")
        assert filled == chunks
        assert bool(list(parts.iterdir())) == (part == "")
        filled.clear()
    assert {path.name for path in one.iterdir()} == {path.name for path in parts.iterdir()}
    for path in one.iterdir():
        assert (parts / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in tmp_path.glob("resume*")] == ["resume"]  # which the job removes


LATE = """
import sys
from pathlib import Path
import numpy as np
import torch
from clipgraft import dist
from clipgraft.data.filling import Filling
world = dist.World(0, 1, torch.device("cpu"))
late = Filling(Path(sys.argv[1]), "a", {"a.npy": (4, 2)}, 4, world, (1, 2))
print("opened", flush=True)
sys.stdin.readline()
late.write("a.npy", 1, np.full((1, 2), 9))
late.mark(1)
late.leave()
print("left", flush=True)
"""


def test_what_is_gathered_is_no_longer_written_by_jobs_of_an_older_set_of_parts(
    tmp_path, caplog, monkeypatch
):
    """One of two parts is late; meanwhile three others have done all of the work."""
    resume, out = tmp_path / "resume", folder(tmp_path / "out")
    command = [sys.executable, "-c", LATE, resume]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as late:
        assert late.stdout.readline() == "opened\n"
        world = dist.World(0, 1, torch.device("cpu"))
        whole = filling.Filling(resume, "a", {"a.npy": (4, 2)}, 4, world)
        for chunk in range(4):
            whole.write("a.npy", chunk, np.full((1, 2), chunk))
            whole.mark(chunk)
        monkeypatch.setattr(lock, "WAIT_SECONDS", 0.5)
        with pytest.raises(ConfigError, match=r"another process is filling .*resume"):
            whole.finish(out, world)
        assert not list(out.iterdir())
        late.stdin.write("\n")
        late.stdin.close()
        assert late.stdout.readline() == "left\n"
    again = filling.Filling(resume, "a", {"a.npy": (4, 2)}, 4, world)
    again.finish(out, world)
    assert np.load(out / "a.npy").tolist() == [[0, 0], [9, 9], [2, 2], [3, 3]]
    assert not resume.exists()


def test_a_gathering_that_fails_leaves_what_is_done(tmp_path):
    world = dist.World(0, 1, torch.device("cpu"))
    given = tmp_path / "resume", "a", {"a.npy": (2, 2), "b.npy": (2, 1)}, 1, world
    whole = filling.Filling(*given)
    whole.write("a.npy", 0, np.ones((2, 2)))
    whole.mark(0)
    with pytest.raises(FileNotFoundError):
        whole.finish(tmp_path / "missing", world)
    again = filling.Filling(*given)
    assert again.num_done == 1
    again.finish(folder(tmp_path / "out"), world)
    assert np.load(tmp_path / "out/a.npy").all()


def test_a_filling_that_lacks_a_file_is_made_anew(tmp_path):
    world = dist.World(0, 1, torch.device("cpu"))
    given = tmp_path / "resume", "a", {"a.npy": (2, 2)}, 1, world
    first = filling.Filling(*given)
    first.mark(0)
    first.leave()
    (tmp_path / "resume/a.npy").unlink()
    assert filling.Filling(*given).num_done == 0


def test_training_from_a_cache_does_not_depend_on_threads_and_follows_its_numbers(
    data, model, tmp_path
):
    out = folder(tmp_path / "cache")
    embed_reference(job(model), *data, out)
    weights = []
    for name, threads in (("one", 1), ("three", 3), ("other", 1)):
        target = folder(tmp_path / name)
        if name == "other":
            stored = np.load(out / "image.npy", mmap_mode="r+")
            stored[:] = np.roll(stored, 1, axis=1)  # each crop with the features of another
            stored.flush()
        facts = pretrain(
            phase(model), *data, None, target, threads=threads, cached={"reference_0": out}
        )
        weights.append((target / "model.safetensors").read_bytes())
    assert facts["samples_seen"] == 80
    assert weights[0] == weights[1] != weights[2]


def test_two_references_share_the_replayed_crop(data, model, tmp_path):
    out = folder(tmp_path / "cache")
    embed_reference(job(model), *data, out)
    one = folder(tmp_path / "one")
    embed_reference(job(model, 1), *data, one)
    several = {"model": str(model), "cached": True, "crops": CROPS}
    settings = phase(model, references=[{**several, "crops": 1}, several])
    given = {"reference_0": one, "reference_1": out}
    opened = open_references(settings, 24, Data.open(*data), torch.device("cpu"), given)
    for batch in batches(data, settings, opened)[:3]:
        first, second = (each.features(batch.images_BCHW, batch) for each in opened)
        rows, crops = batch.rows_B.numpy(), batch.crop_B.numpy()
        for features, expected in (
            (first, np.load(one / "image.npy")[rows, 0]),
            (second, np.load(out / "image.npy")[rows, crops]),
        ):
            np.testing.assert_allclose(features.image_BD, expected, atol=5e-4)
        assert torch.equal(first.text_BD, second.text_BD)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"samples_id": "0" * 16}, ["samples_id = 0000", "embed` again"]),
        ({"num_captions": 7}, ["num_captions = 7, not 39"]),
        ({"model": "ViT-B-32"}, ["model = ViT-B-32, not"]),
        ({"pretrained": "openai"}, ["pretrained = openai, not None"]),
        ({"crops": 5}, ["crops = 5, not 3"]),
        ({"augmentation": {"crop_scale": [0.5, 1.0]}}, ["augmentation = ", "crop_scale"]),
        ({"dim": 23}, ["image.npy has shape [20, 3, 24], not [20, 3, 23]"]),
        ("reference.json", ["holds no embeddings of a reference", "run the stage `embed`"]),
        ("text.npy", ["text.npy cannot be read", "run the stage `embed` again"]),
    ],
)
def test_a_cache_of_something_else_is_one_clear_error(data, model, tmp_path, wrong, words):
    out = folder(tmp_path / "cache")
    embed_reference(job(model), *data, out)
    if isinstance(wrong, str):
        (out / wrong).unlink()
    else:
        about = json.loads((out / "reference.json").read_text())
        (out / "reference.json").write_text(json.dumps(about | wrong))
    with pytest.raises(ConfigError) as error:
        references_of(data, phase(model), out)
    for word in words:
        assert word in str(error.value)


def test_a_cache_that_is_cut_not_given_or_of_other_crops_is_refused(data, model, tmp_path):
    out = folder(tmp_path / "cache")
    embed_reference(job(model), *data, out)
    with pytest.raises(ConfigError, match="--input reference_0=MANIFEST"):
        references_of(data, phase(model), None)
    other = folder(tmp_path / "other")
    embed_reference(job(model, seed=1), *data, other)
    caches = [
        ReferenceCache.open(each, Data.open(*data).shards.samples_id, 39, {})
        for each in (out, other)
    ]
    with pytest.raises(ConfigError, match="their stored crops differ"):
        shared_crops(caches)
    with (out / "image.npy").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(ConfigError, match=r"image\.npy cannot be read"):
        references_of(data, phase(model), out)


def test_captions_come_in_the_order_of_the_index_whatever_its_row_groups(data, tmp_path):
    import pyarrow.parquet as pq

    samples = Samples.open(data[0])
    table = pq.read_table(data[0] / "samples.parquet")
    for size in (3, 7, 100):
        pq.write_table(table, tmp_path / "samples.parquet", row_group_size=size)
        captions = Captions(tmp_path)
        for first, stop in ((0, N), (2, 3), (5, 16), (6, 6)):
            expected = [text for row in range(first, stop) for text in samples.captions(row)]
            assert captions.of_rows(first, stop) == expected


MILLIONS = """
import json, sys, numpy as np, psutil
from pathlib import Path
from clipgraft.data.cached import ReferenceCache
folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
process = psutil.Process()
cache = ReferenceCache.open(folder, "a", 20_000_000, {"crops": 10})
before = process.memory_info().rss
for _ in range(10):
    rows = rng.integers(0, 10_000_000, 512)
    crops = cache.crops.choose(0, rows, np.full(512, 3))
    read = cache.read(rows, 2 * rows, crops)
    cache.crops.sizes(rows)
print(json.dumps([read.shape, process.memory_info().rss - before]))
"""


def test_ten_million_samples_take_the_memory_of_what_is_read(tmp_path):
    num, dim = 10_000_000, 512
    for name, shape, kind in (
        ("image", (num, 10, dim), np.float16),
        ("text", (2 * num, dim), np.float16),
        ("sizes", (num, 2), np.uint32),
    ):  # 123 GB of holes
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", kind, shape)
    about = {"samples_id": "a", "num_samples": num, "num_captions": 2 * num, "dim": dim}
    about |= {"crops": 10, "seed": 0, "scale": 100.0, "augmentation": {}}
    (tmp_path / "reference.json").write_text(json.dumps(about))
    command = [sys.executable, "-c", MILLIONS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, grown = json.loads(done.stdout)
    assert shape == [512, 2 * dim]
    # 5,120 rows of images and texts, each on one or two pages of 4 KB, and a page of sizes.
    assert grown < 5120 * 5 * 4096


def test_what_is_gathered_is_there_for_a_start_after_a_kill(tmp_path):
    """Between the last row and the manifest much time may pass: a large array is read once more for its checksum."""
    world = dist.World(0, 1, torch.device("cpu"))
    given = tmp_path / "resume", "a", {"a.npy": (2, 2)}, 1, world
    first = filling.Filling(*given)
    first.write("a.npy", 0, np.ones((2, 2)))
    first.mark(0)
    first.finish(folder(tmp_path / "killed"), world, is_kept=True)
    again = filling.Filling(*given)
    assert (again.num_done, len(again.own_todo)) == (1, 0)
    again.finish(folder(tmp_path / "out"), world, is_kept=True)
    files = [tmp_path / name / "a.npy" for name in ("resume", "killed", "out")]
    assert len({path.stat().st_ino for path in files}) == 1  # and no room is taken twice
    assert np.load(files[-1]).all()
