"""Laws of addresses: what others write as a URL reaches neither this site nor this machine.

The attacks run in a network of their own, with real addresses of the open internet: `private_network.py`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipgraft.data.fetch_process import is_public

HERE = Path(__file__).parent
UNSHARE = ["unshare", "--map-root-user", "--net", "--mount"]


@pytest.fixture(scope="module")
def alone():
    """Whether processes here may have a network of their own."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("no unshare or no ip on this machine: apt-get install util-linux iproute2")
    words = [*UNSHARE, "mount", "--bind", "/dev/null", "/etc/resolv.conf"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine gives no network of its own: {done.stderr.strip()}")


def attack(folder: Path, fetch=(), read=()) -> dict:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.jpg")
    (folder / "asked.json").write_text(json.dumps({"fetch": list(fetch), "read": list(read)}))
    free = {**os.environ, "CLIPGRAFT_NO_NETWORK": "0"}
    command = [*UNSHARE, sys.executable, str(HERE / "private_network.py"), str(folder)]
    done = subprocess.run(command, env=free, capture_output=True, text=True, timeout=120)
    assert (folder / "told.json").is_file(), done.stderr[-3000:]
    return json.loads((folder / "told.json").read_text())


def test_urls_of_a_table_lead_nowhere_inside(alone, tmp_path):
    outside = "http://93.184.216.34"
    open_ones = [f"{outside}/a.jpg", "http://site.test/a.jpg", f"{outside}/to/site.test/a.jpg"]
    attacks = [
        "http://10.0.0.5/a.jpg",
        "http://inside.test/a.jpg",
        "http://169.254.169.254/latest/meta-data",
        "http://100.64.0.1/a.jpg",
        "http://0/a.jpg",
        "http://127.1/a.jpg",
        "http://0x7f000001/a.jpg",
        "http://2130706433/a.jpg",
        "http://0177.0.0.1/a.jpg",
        "http://[::1]/a.jpg",
        "http://[::ffff:10.0.0.5]/a.jpg",
        "http://[::ffff:a00:5]/a.jpg",
        "http://[::127.0.0.1]/a.jpg",
        "http://[2002:7f00:1::]/a.jpg",
        "http://[2002:a00:5::]/a.jpg",
        f"{outside}/to/10.0.0.5/a.jpg",
        f"{outside}/to/inside.test/a.jpg",
        f"{outside}/to/[::ffff:169.254.169.254]/a.jpg",
        "http://rebind1.test/to/rebind1.test/a.jpg",
        "file:///etc/passwd",
        "ftp://10.0.0.5/a.jpg",
        "data:image/png;base64,AAAA",
    ]
    told = attack(tmp_path, fetch=open_ones + attacks)
    assert told["inside"] == []
    fetched = dict(zip(open_ones + attacks, told["fetched"], strict=True))
    assert [fetched[url][0] for url in open_ones] == ["ok"] * 3, fetched
    assert {fetched[url][0] for url in attacks} == {"failed"}, fetched
    for url in ("http://10.0.0.5/a.jpg", f"{outside}/to/10.0.0.5/a.jpg", attacks[-4]):
        assert "loopback, private or link-local" in fetched[url][1], fetched[url]
    assert told["answers"]["rebind1"] >= 2  # or nothing was tried


def test_an_address_of_a_setting_leads_inside_only_if_it_is_inside(alone, tmp_path):
    outside = "http://93.184.216.34"
    attacks = [
        f"{outside}/to/10.0.0.5/secret.csv",
        f"{outside}/to/169.254.169.254/secret.csv",
        f"{outside}/to/127.0.0.1/secret.csv",
        f"{outside}/to/[0:0:0:0:0:0:0:1]/secret.csv",
        f"{outside}/to/inside.test/secret.csv",
        "http://rebind2.test/secret.csv",
        "http://rebind3.test/to/rebind3.test/secret.csv",
    ]
    wanted = [f"{outside}/a.csv", "http://site.test/a.csv", "http://inside.test/own.csv"]
    told = attack(tmp_path, read=attacks + wanted)
    for url, text in zip(attacks, told["read"][: len(attacks)], strict=True):
        assert text.startswith("error: ") and "it leads to" in text, (url, text)
    assert {asked.rpartition("/")[2] for asked in told["inside"]} == {"own.csv"}
    assert told["read"][len(attacks) :] == ["key,open\n"] * 2 + ["key,secret\n1,of the inside\n"]
    assert told["answers"]["rebind2"] >= 2


@pytest.mark.parametrize(
    "host",
    [
        "::127.0.0.1",  # as IPv6 wrote IPv4 at first
        "::ffff:0:10.0.0.5",  # as translators write it
        "64:ff9b:1::a00:5",
        "fec0::1",
        "192.0.0.8",
        "5f00::1",
        "2001:0:7f00:1::",
        "2002:7f00:1::",
        "2002:a00:5::",
    ],
)
def test_unusual_ways_to_write_an_inner_address_are_not_public(host):
    assert not is_public(host)


def test_a_local_file_without_end_is_cut_off_where_local_files_are_allowed(tmp_path):
    code = (
        "import os, resource, urllib.request\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from clipgraft.data import fetch_process\n"
        "fetch_process._guard_urls({'file'}, True, 5.0)\n"
        "try: urllib.request.urlopen('file:///dev/zero').read()\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "refused: more than 64 MB\n", done.stderr[-500:]
