import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig, PrepareConfig, SourceConfig
from data.dataset import TrainingData
from data.errors import DataError
from data.heldout import HeldOut
from data.indexed import IndexedReader
from data.prepare import main, prepare
from data.tokenize_unit import is_validation
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def write_source(folder: Path, *, count: int = 300, repeat: int = 20) -> Path:
    folder.mkdir()
    lines = [json.dumps({"text": f"def f{i}():\n    return {i};\n" * repeat}) + "\n" for i in range(count)]
    for k in range(3):
        (folder / f"{k}.jsonl").write_text("".join(lines[k::3]))
    return folder


def make_config(source: Path, out: Path, **changes: object) -> PrepareConfig:
    options = {"train_tokenizer": 300, "validation_fraction": 0.1} | changes
    return PrepareConfig(sources=[str(source)], out=str(out), **options)  # pyright: ignore[reportArgumentType]


def digests(out: Path) -> dict[str, str]:
    """Return the content of everything that must be the same bytes on every machine."""
    files = [*out.glob("*/*.bin"), *out.glob("*/*.idx"), out / "tokenizer.json", out / "manifest.json"]
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "texts")


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(make_config(source, tmp_path_factory.mktemp("out") / "corpus"))


def test_all_documents_arrive_once_in_order_on_their_side(source: Path, prepared: Path) -> None:
    tokenizer = load_tokenizer(prepared)
    texts = [
        json.loads(line)["text"]
        for file in sorted(source.iterdir())
        for line in file.read_text().splitlines()
    ]
    for split, held in (("train", False), ("validation", True)):
        (prefix,) = (Path(str(file).removesuffix(".bin")) for file in (prepared / split).glob("*.bin"))
        reader = IndexedReader(prefix)
        stored = [reader.document(i).tolist() for i in range(reader.num_documents)]
        assert all(document[-1] == tokenizer.eos_id for document in stored)
        expected = [text for text in texts if is_validation(text, 0.1) == held]
        assert [tokenizer.decode(document[:-1]) for document in stored] == expected
        assert len(expected) > 10


def test_manifest_describes_the_corpus(prepared: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["tokenizer"]["fim"] == {"begin": 3, "hole": 2, "end": 4}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 300
    assert not (prepared / "parts").exists()


def test_a_prepared_folder_opens_for_training_and_evaluation(prepared: Path) -> None:
    config = DataConfig(
        sources={"a": SourceConfig(path=str(prepared))},
        validation=str(prepared),
        tokenizer=str(prepared / "tokenizer.json"),
    )
    data = TrainingData(config, seed=0, seq_len=64, extra_tokens=2)
    assert "return" in load_tokenizer(prepared).decode(data.sample(0).tolist())
    held = HeldOut(config, seq_len=64, extra=2)
    inside = DataConfig(
        sources=config.sources, validation=str(prepared / "validation"), tokenizer=config.tokenizer
    )
    assert np.array_equal(held.batch(0, 2), HeldOut(inside, seq_len=64, extra=2).batch(0, 2))


def test_worker_processes_give_the_same_bytes(source: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(make_config(source, tmp_path / "out"), workers=2)
    assert digests(tmp_path / "out") == digests(prepared)


def test_a_finished_command_does_nothing(source: Path, prepared: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in prepared.rglob("*") if file.name != ".lock"}
    started = time.monotonic()
    assert prepare(make_config(source, prepared)) == prepared
    assert time.monotonic() - started < 2
    assert before == {file: file.stat().st_mtime_ns for file in prepared.rglob("*") if file.name != ".lock"}


def wait_for_parts(out: Path, process: subprocess.Popen[bytes], *, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("parts/*.json"))) < count:
        assert process.poll() is None, "the preparation ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, f"processes {pids} outlive the one that started them"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_in_the_middle_then_the_same_command(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for k in range(6):  # one unit a file
        line = json.dumps({"text": f"def f{k}():\n    return {k};\n" * 60}) + "\n"
        lines = [line.replace("return", f"return {i} +") for i in range(60)]
        (folder / f"{k}.jsonl").write_text("".join(lines))
    whole = prepare(make_config(folder, tmp_path / "whole"))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "data.prepare", str(folder), "--out", str(out)]
    command += ["--train-tokenizer", "300", "--validation-fraction", "0.1", "--workers", str(workers)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for_parts(out, process, count=1)
    workers_alive = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in out.glob("parts/*.json")}
    assert done
    with pytest.raises(DataError, match="is not finished"):
        TrainingData(
            DataConfig(sources={"a": SourceConfig(path=str(out))}, tokenizer=str(out)),
            seed=0,
            seq_len=8,
            extra_tokens=1,
        )
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "units are done already" in result.stderr
    assert digests(out) == digests(whole)
    wait_until_gone(workers_alive)


def test_a_part_that_was_being_written_is_made_again(source: Path, prepared: Path, tmp_path: Path) -> None:
    out = start_by_hand(prepared, tmp_path / "out")
    for name in ("000000.train.bin", "000001.train.bin.tmp", "000001.json.tmp"):
        (out / "parts" / name).write_bytes(b"torn")
    prepare(make_config(source, out))
    assert digests(out) == digests(prepared)


def from_a_terminal() -> None:
    """Undo what a shell does to its background jobs, and whatever they start: Ctrl-C is ignored there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_from_the_keyboard_ends_all_processes_at_once(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", count=2000, repeat=150)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data.prepare", str(folder), "--out", str(out), "--workers", "1"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=from_a_terminal,
    )
    wait_for_parts(out, process, count=1)
    workers_alive = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert b"interrupted; the same command goes on where it stopped" in error
    assert b"Traceback" not in error
    wait_until_gone(workers_alive)


def test_a_full_disk_is_told_and_nothing_is_lost(source: Path, prepared: Path, tmp_path: Path) -> None:
    out = start_by_hand(prepared, tmp_path / "out")
    (out / "parts" / "000001.train.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"No space left on device; when the disk has room.*the same command"):
        prepare(make_config(source, out))
    (out / "parts" / "000001.train.bin.tmp").unlink()
    assert (out / "parts" / "000000.json").is_file()
    prepare(make_config(source, out))
    assert digests(out) == digests(prepared)


def start_by_hand(prepared: Path, out: Path) -> Path:
    """Make a folder look as one does after the first moment of the command that made `prepared`."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    (out / "parts").mkdir(parents=True)
    started = {key: manifest[key] for key in ("version", "options", "plan", "num_units")}
    (out / "manifest.json").write_text(json.dumps(started | {"status": "incomplete"}))
    return out


def test_fused_tokens_are_split_on_request(source: Path, prepared: Path, tmp_path: Path) -> None:
    split = prepare(make_config(source, tmp_path / "out", split_fused_rate=1.0))
    tokenizer = load_tokenizer(split)
    whole, parts = (IndexedReader(out / "train" / "shard-00000") for out in (prepared, split))
    assert parts.num_documents == whole.num_documents
    assert parts.num_tokens > whole.num_tokens
    for i in range(5):
        assert tokenizer.decode(parts.document(i).tolist()) == tokenizer.decode(whole.document(i).tolist())


class TestErrors:
    def test_changed_options(self, source: Path, prepared: Path) -> None:
        with pytest.raises(DataError, match=r"validation_fraction was 0.1, now 0.2; use another"):
            prepare(make_config(source, prepared, validation_fraction=0.2))
        with pytest.raises(
            DataError, match=r"tokenizer was 'byte-level BPE of 300.*now 'byte-level BPE of 400"
        ):
            prepare(make_config(source, prepared, train_tokenizer=400))

    def test_sources_that_change_during_an_interruption(
        self, prepared: Path, tmp_path: Path, source: Path
    ) -> None:
        manifest = json.loads((prepared / "manifest.json").read_text())
        (tmp_path / "manifest.json").write_text(
            json.dumps(manifest | {"status": "incomplete", "plan": "other"})
        )
        with pytest.raises(DataError, match=r"have changed since the interrupted preparation"):
            prepare(make_config(source, tmp_path))

    def test_a_folder_of_something_else(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(
            DataError, match=r"is not empty \(thesis.tex\) and has no manifest.json; use a new"
        ):
            prepare(make_config(source, tmp_path))
        (tmp_path / "manifest.json").write_text("[]")
        with pytest.raises(DataError, match=r"is not a manifest of data.prepare"):
            prepare(make_config(source, tmp_path))

    def test_no_training_documents(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
        with pytest.raises(DataError, match=r"gave no training documents; check that the sources hold text"):
            prepare(make_config(tmp_path / "a.jsonl", tmp_path / "out"))
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        with pytest.raises(
            DataError, match=r"no training documents \(skipped, not UTF-8 text: 1 files: .*latin"
        ):
            prepare(make_config(tmp_path / "latin.txt", tmp_path / "out2"))

    def test_bad_values_are_all_named(self, tmp_path: Path) -> None:
        config = PrepareConfig(sources=[], out=str(tmp_path), validation_fraction=1.5)
        with pytest.raises(DataError, match=r"sources=\[\] must name.*; validation_fraction=1.5 must lie in"):
            prepare(config)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--workers", "-1"], "workers=-1 must not be negative"),
            (["--name", "a/b"], "name='a/b' must be the beginning of a file name"),
            (["--out", "{source}"], "cannot be made"),
        ],
    )
    def test_bad_options_write_nothing(
        self, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = tmp_path / "a.txt"
        source.write_text("text")
        arguments = [str(source), "--out", str(tmp_path / "out")]
        assert main([*arguments, *(text.format(source=source) for text in more)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert list(tmp_path.iterdir()) == [source]

    def test_an_error_in_a_worker_process_is_told_once(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
        arguments = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--workers", "2"]
        assert main([*arguments, "--tokenizer", "deepseek-v3"]) == 2
        error = capfd.readouterr().err
        assert "no field 'text'; the record has body; name it with --text-key" in error
        assert "Traceback" not in error

    def test_command_line_summary(
        self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "latin.txt").write_bytes(b"\xe9")
        arguments = [str(source), str(tmp_path / "latin.txt"), "--out", str(tmp_path / "out")]
        assert main([*arguments, "--train-tokenizer", "300", "--name", "code"]) == 0
        told = capsys.readouterr().out
        assert "train: 2" in told
        assert "characters a token" in told
        assert "tokenizer of 300 tokens (byte-level BPE of 300 trained on the sources)" in told
        assert "skipped, not UTF-8 text: 1 files" in told
        assert (tmp_path / "out" / "train" / "code-00000.bin").is_file()
