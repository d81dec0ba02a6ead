"""Plug-ins for accelerators that are not here do not speak, and nothing else is held back."""

import os
import sys

from moecc_backends.xla import import_jax as quiet


def test_what_may_be_an_accelerator_is_left_to_jax(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in [n for n in os.environ if n.startswith("TPU_")]:
        monkeypatch.delenv(name)
    vendor = tmp_path / "vendor"
    vendor.write_text("0x8086\n")
    monkeypatch.setattr(quiet, "_DEVICES", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.setattr(quiet, "_PCI_VENDORS", str(vendor))
    assert not quiet.has_accelerator()
    vendor.write_text("0x1ae0\n")
    assert quiet.has_accelerator()
    vendor.write_text("0x8086\n")
    (tmp_path / "nvidia0").touch()
    assert quiet.has_accelerator()
    (tmp_path / "nvidia0").unlink()
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert quiet.has_accelerator()
