"""Models in several files, as the `gguf` package writes them."""

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.formats.gguf.reader import open_gguf

gguf = pytest.importorskip("gguf")


def split(whole, target, *, small_first=False):
    """Write the file again in parts of four tensors."""
    stored = gguf.GGUFReader(whole)
    architecture = stored.fields["general.architecture"].contents()
    options = {"split_max_tensors": 4, "small_first_shard": small_first}
    writer = gguf.GGUFWriter(target, architecture, **options)
    for name, field in stored.fields.items():
        if name != "general.architecture" and not name.startswith("GGUF."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in stored.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(target.parent.glob(f"{target.stem}-*"))


@pytest.fixture
def parts(small_model, tmp_path):
    """Return the files of a small model in parts, beside the model in one."""
    return split(small_model().write(tmp_path / "one.gguf"), tmp_path / "model.gguf")


def test_parts_are_read_as_the_whole(parts, tmp_path):
    assert len(parts) > 2
    with open_gguf(tmp_path / "one.gguf") as whole, open_gguf(parts[1]) as joined:
        assert joined.config == whole.config
        assert joined.files() == parts
        assert joined.tensors.keys() == whole.tensors.keys()
        for name in whole.tensors:
            np.testing.assert_array_equal(joined.read(name), whole.read(name))
        joined.require_unchanged()
        parts[2].write_bytes(parts[2].read_bytes() + b"x")
        with pytest.raises(InputError, match="changed"):
            joined.require_unchanged()


def test_what_is_missing_is_named(parts):
    parts[-1].rename(parts[-1].with_name("away"))
    parts[1].unlink()
    with pytest.raises(InputError) as caught:
        open_gguf(parts[0])
    message = str(caught.value)
    assert message.count("a part of the model is missing") == 2
    assert parts[-1].name in message


def test_parts_in_another_order_or_of_another_model(parts):
    first, second = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(second)
    with pytest.raises(InputError, match=r"not the one that its name says"):
        open_gguf(parts[0])
    parts[1].write_bytes(first)
    parts[2].write_bytes(first)
    with pytest.raises(InputError, match=r"'split.no'"):
        open_gguf(parts[0])
    odd = parts[0].rename(parts[0].with_name("odd.gguf"))
    with pytest.raises(InputError, match="the others cannot be found"):
        open_gguf(odd)
