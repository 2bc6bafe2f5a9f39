"""Tokens and keys are found in whatever is pushed, words that look alike are not, and tensors are not read."""

from __future__ import annotations

import ast
import base64
import io
import json
import random
from pathlib import Path

import pytest
import torch
from loopback_hub import TOKEN, USER, hub  # noqa: F401
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import hf_dualspeed
from hf_dualspeed.hub import secrets
from hf_dualspeed.hub.secrets import check_no_secret, kind_of_secret, text_in
from hf_dualspeed.hub.upload import push_files

ROOT = Path(hf_dualspeed.__file__).parents[1]
REPO = f"{USER}/thing"
MIXED = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hJ6"  # 36 letters and figures
HEX = "0123456789abcdef0123456789abcdef01234567"

# Put together here, so that nobody takes this file for one that holds keys.
SECRETS = {
    "hub": ("a Hub token", "hf_" + MIXED[:34]),
    "organization": ("a Hub token", "api_org_" + MIXED[:34]),
    "oauth": ("an OAuth token", "eyJ" + MIXED + ".eyJ" + MIXED + "." + MIXED),
    "hub oauth": ("an OAuth token", "hf_oauth_" + "eyJ" + MIXED[:8] + "." + MIXED),
    "github": ("a GitHub token", "ghp_" + MIXED),
    "github app": ("a GitHub token", "ghs_" + MIXED),
    "github oauth": ("a GitHub token", "gho_" + MIXED),
    "github user": ("a GitHub token", "ghu_" + MIXED),
    "github refresh": ("a GitHub token", "ghr_" + MIXED),
    "github fine": ("a GitHub token", "github_pat_" + MIXED[:22] + "_" + MIXED + MIXED[:23]),
    "openai": ("an OpenAI key", "sk-" + MIXED[:20] + "T3Blbk" + "FJ" + MIXED[:20]),
    "openai project": ("an OpenAI key", "sk-proj-" + MIXED + "_-" + MIXED),
    "anthropic": ("an Anthropic key", "sk-ant-api03-" + MIXED + "-" + MIXED),
    "aws": ("an AWS key", "AKIA" + "IOSFODNN7EXAMPLE"),
    "aws session": ("an AWS key", "ASIA" + "IOSFODNN7EXAMPLE"),
    "aws secret": ("an AWS key", "aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
    "aws in json": ("an AWS key", '"SecretAccessKey": "' + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY" + '"'),
    "google": ("a Google key", "AIza" + "SyA" + MIXED[:32]),
    "slack": ("a Slack token", "xoxb-" + "123456789012-" + MIXED[:24]),
    "wandb": ("a Weights & Biases key", "WANDB_API_KEY=" + HEX),
    "wandb in yaml": ("a Weights & Biases key", "wandb_key: '" + HEX + "'"),
    "arguments": ("a Hub token", '"hub_token": "' + "of-a-hub-of-ones-own-1" + '"'),
    "key": ("a key", "my_api_key = " + MIXED),
    "ssh": ("a private key", "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3Blb"),
    "pem": ("a private key", "-----BEGIN " + "PRIVATE KEY-----\nMIIE"),
    "rsa": ("a private key", "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE"),
    "ec": ("a private key", "-----BEGIN EC " + "PRIVATE KEY-----\nMIIE"),
    "encrypted": ("a private key", "-----BEGIN ENCRYPTED " + "PRIVATE KEY-----\nMIIE"),
    "pgp": ("a private key", "-----BEGIN PGP " + "PRIVATE KEY BLOCK-----\n"),
    "netrc": ("a password as in .netrc", "machine huggingface.co\n  login me\n  password " + "correcthorse"),
    "netrc in a line": ("a password as in .netrc", "machine api.wandb.ai login user password " + HEX),
    "address": ("a password in an address", "https://me:" + MIXED[:20] + "@huggingface.co/me/thing"),
}


def picture(words: str, compressed: bool, international: bool = False, after: bool = False) -> bytes:
    """A PNG with a text, before its pixels or after them."""
    info, file = PngInfo(), io.BytesIO()
    (info.add_itxt if international else info.add_text)("note", words, zip=compressed)
    Image.new("L", (2, 2)).save(file, "PNG", pnginfo=info)
    data = file.getvalue()
    if after:
        begin, end = data.index(b"zTXt") - 4, data.index(b"IDAT") - 4
        pixels, ends = data[end : data.index(b"IEND") - 4], data[data.index(b"IEND") - 4 :]
        data = data[:begin] + pixels + data[begin:end] + ends
    return data


def carried(folder: Path, secret: str) -> dict[str, Path | bytes]:
    """The secret in each kind of file that is pushed."""
    words = f"see:\n{secret}\n"
    added = {"added_tokens": [{"id": 7, "content": f"\u2581{secret}"}], "model": {"vocab": {"a": 0}}}
    save_file({"a": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt", "note": words})
    torch.save({"state": {0: torch.ones(2)}, "note": words}, folder / "optimizer.pt")
    return {
        "README.md": words.encode(),
        "tokenizer.json": json.dumps(added, ensure_ascii=False).encode(),
        "added_tokens.json": json.dumps({f"\u2581{secret}": 1, "\n" + secret: 2}).encode(),
        "tokenizer_config.json": json.dumps({"chat_template": f"{{# {words} #}}"}).encode(),
        "chat_template.jinja": f"{{# {words} #}}".encode(),
        "LICENSE": words.encode("utf-16"),
        "curve.svg": f"<svg><!-- {words} --></svg>".encode(),
        "plain.png": picture(words, False),
        "compressed.png": picture(words, True),
        "international.png": picture(words, True, international=True),
        "after.png": picture(words, True, after=True),
        "model.safetensors": folder / "model.safetensors",
        "optimizer.pt": folder / "optimizer.pt",
    }


@pytest.mark.parametrize("name", SECRETS)
def test_each_kind_is_found_in_each_file_and_never_shown(tmp_path, name):
    kind, secret = SECRETS[name]
    for file, content in carried(tmp_path, secret).items():
        with pytest.raises(ValueError, match="is not pushed") as refused:
            check_no_secret({"config.json": b"{}", file: content}, folder="run")
        assert str(refused.value).startswith(f"'run/{file}' holds what looks like {kind} and"), file
        assert secret not in str(refused.value)
        assert MIXED[:16] not in str(refused.value)
        assert HEX not in str(refused.value)


@pytest.mark.parametrize("token", ["of-a-hub-of-ones-own", "anything at all"])
def test_a_token_in_use_is_found_however_it_looks(tmp_path, token):
    for file, content in carried(tmp_path, token).items():
        with pytest.raises(ValueError, match=f"{file}' holds your Hub token") as refused:
            check_no_secret({file: content}, [None, True, token])
        assert token not in str(refused.value)


def test_compressed_text_of_pictures_is_searched_up_to_a_limit(monkeypatch):
    bomb = picture("a" * 10**6, True)
    check_no_secret({"curve.png": bomb})
    check_no_secret(
        {"curve.png": picture("none", True)[:60], "other.png": picture("none", True).replace(b"x\x9c", b"??")}
    )
    monkeypatch.setattr(secrets, "INFLATED_LIMIT", 10**5)
    with pytest.raises(ValueError, match="'curve.png' holds more compressed text than can be searched"):
        check_no_secret({"curve.png": bomb})


NONE = [
    "task-specific risk-averse desk-0123456789abcdefghijk sk-learn sk-toggleable__content sk-estimator-doc-link",
    "hf_hub_download hf_transformers_model_configuration_class HF_TOKEN hf_ api_org_ ghp_ gho_test github_pat_",
    'token = os.environ["HF_TOKEN"]; hub_token: null, "hub_token": "<HUB_TOKEN>", push_to_hub_token=None',
    'api_key = "YOUR_API_KEY_GOES_RIGHT_HERE", wandb_api_key=os.environ["WANDB_API_KEY"], api_key: str | None = None',
    '{"password": 12345, "api_key": 50256, "secret_access_key": 1234567, "AKIA": 5, "AIza": 6, "xoxb-": 7, "eyJ": 8}',
    "machine learning needs a login and a password; machine <host> login <user> password <token>",
    "https://user:password@host, https://example.org:8080/a@b, git@github.com:user/repo.git, s3://bucket/key",
    "-----BEGIN CERTIFICATE----- -----BEGIN PUBLIC KEY----- ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABgQ",
    "AKIAIOSFODNN7 XAKIAIOSFODNN7EXAMPLE AKIAIOSFODNN7EXAMPLElonger",
    "sha256:" + HEX + ' "sha": "' + HEX + '"',
]


@pytest.mark.parametrize("text", NONE)
def test_what_only_looks_alike_is_no_secret(text):
    assert kind_of_secret(text.encode()) is None
    assert kind_of_secret(json.dumps({"added": text, text: 1}).encode()) is None


def test_a_vocabulary_of_all_beginnings_is_no_secret():
    """One token a line, in JSON, and merged, as tokenizers hold the words of their training data."""
    words = [word for text in NONE for word in text.split()]
    words += [prefix for _, secret in SECRETS.values() for prefix in (secret[:4], secret[:8], secret[4:12])]
    for separator in ("\n", " ", '": 1, "', "\n\u0120"):
        assert kind_of_secret(separator.join(words).encode()) is None


def test_numbers_by_chance_are_no_secret():
    chance = random.Random(0)
    data = chance.randbytes(3_000_000)
    for text in (data, base64.b64encode(data), base64.urlsafe_b64encode(data), data.hex().encode()):
        assert kind_of_secret(text) is None


def test_files_of_this_project_hold_none():
    paths = [path for end in ("md", "yaml", "json", "jinja", "txt") for path in ROOT.glob(f"[!.]*/**/*.{end}")]
    paths = [path for path in (*paths, *ROOT.glob("*.md")) if not {*path.parts} & {"runs", "data", "build"}]
    assert len(paths) > 30
    check_no_secret({path.relative_to(ROOT).as_posix(): path for path in paths})


def test_tensors_are_not_read(tmp_path):
    save_file({"a": torch.ones(1000)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    torch.save({"a": torch.ones(1000), "b": "words"}, tmp_path / "a.pt")
    (tmp_path / "a.distcp").write_bytes(b"x" * 1000)
    header = text_in(tmp_path / "a.safetensors")
    assert json.loads(header)["__metadata__"] == {"format": "pt"}
    assert b"words" in text_in(tmp_path / "a.pt")
    assert len(text_in(tmp_path / "a.pt")) < 1000
    assert text_in(tmp_path / "a.distcp") == b""
    # A header that claims to be larger than any is read no further than it may be.
    (tmp_path / "b.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    assert text_in(tmp_path / "b.safetensors") == b"{}"
    (tmp_path / "b.pt").write_bytes(b"PK\x03\x04 is no archive")
    assert b"no archive" in text_in(tmp_path / "b.pt")


# --- the one way to the Hub ---------------------------------------------------------------------------------------


def test_links_and_what_is_no_file_are_refused_before_anything_is_made(hub, tmp_path):  # noqa: F811
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "config.json")
    for path in (tmp_path / "link.json", tmp_path, Path("/dev/null"), tmp_path / "gone"):
        with pytest.raises(ValueError, match="is a link or no file, and is not pushed"):
            push_files({"config.json": tmp_path / "config.json", "other.json": path}, REPO, "message")
    with pytest.raises(ValueError, match=r"'a\.md' holds your Hub token"):
        push_files({"a.md": TOKEN.encode()}, REPO, "message")
    assert not hub.log


def test_no_other_place_uploads():
    """Whatever goes to the Hub passes the check."""
    ways = {"create_commit", "upload_file", "upload_folder", "upload_large_folder", "CommitOperationAdd"}
    found = set()
    for path in (ROOT / "hf_dualspeed").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", getattr(node, "id", ""))
            of_super = name in ("push_to_hub", "_push_from_checkpoint") and ast.unparse(node).startswith("super(")
            if name in ways or of_super:
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"hf_dualspeed/hub/upload.py"}
