"""A trainer that writes what no page should obey to stderr and ends as its spec's `heads` says."""

import sys
from pathlib import Path

from worker.training.spec import decode_heads_spec

SAID = [
    b"\x1b[33mUserWarning: slow\x1b[0m\n",
    b"\n",
    b"0 %\r50 %\r100 %\r\n",
    b"<script>alert(1)</script> \x00\x1b]0;title\x07\xe2\x80\xae\xff\n",
    b"last words\n",
]

if __name__ == "__main__":
    sys.stderr.buffer.writelines(SAID)
    sys.stderr.buffer.flush()
    sys.exit(decode_heads_spec(Path(sys.argv[2]).read_bytes()).heads)
