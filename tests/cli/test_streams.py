"""Any text can be printed in any encoding, and the output of a command need not be read to its end."""

import io
import subprocess
import sys

import pytest

from analysis.cli.streams import prepare_output_streams

COMMAND = "import sys; sys.argv = ['analyze', 'list', 'attacks']; from analysis.cli.main import main; main()"


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", "-0.5 +- 1 ? x?"), ("latin-1", "-0.5 ± 1 ? x?"), ("utf-8", "−0.5 ± 1 日 x?")],
)
def test_what_an_encoding_lacks_is_replaced_and_a_sign_is_kept(monkeypatch, encoding, printed):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding))
    monkeypatch.setattr(sys, "stderr", None)  # as without a terminal on Windows
    prepare_output_streams()
    sys.stdout.write("−0.5 ± 1 日 x\ud83d")
    sys.stdout.flush()
    assert buffer.getvalue().decode(encoding) == printed


def test_a_reader_that_stops_early_is_no_error():
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONIOENCODING": "latin-1", "PYTHONPATH": ":".join(sys.path)},
    )
    command.stdout.close()
    _, error = command.communicate()
    assert error == b"" and command.returncode in (0, 1)
