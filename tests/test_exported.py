"""Exported programs: whatever a file holds, nothing in it is unpickled or run as Python."""

import io
import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from small_models import SmallNet
from small_runs import dense_mixture
from torch import nn

from dwf.checks import CheckpointError
from dwf.exported import load_program

IMAGES = torch.rand(5, 3, 8, 8)
CONFIG, PROGRAM = "data/weights/model_weights_config.json", "models/model.json"


def export(model, path, **options):
    program = torch.export.export(model.eval(), (IMAGES,), **options)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    batch = torch.export.Dim("B", min=1)
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    return export(SmallNet(), path, dynamic_shapes=({0: batch},))


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "owned"


class Payload:
    """A pickle of this runs a command wherever it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def payload(mark):
    stream = io.BytesIO()
    torch.save(Payload(mark), stream)
    return stream.getvalue()


def rewritten(saved, path, change):
    """The archive after ``change(files)``; JSON files are parsed before it."""
    with zipfile.ZipFile(saved) as old:
        files = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    files = {k: json.loads(v) if k.endswith(".json") else v for k, v in files.items()}
    change(files)
    with zipfile.ZipFile(path, "w") as new:
        for name, value in files.items():
            data = value if isinstance(value, bytes) else json.dumps(value)
            new.writestr(f"model/{name}", data)
    return path


def graph(files):
    return files[PROGRAM]["graph_module"]["graph"]


class WithoutGradients(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 4)
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def forward(self, images):
        with torch.no_grad():
            scale = images.flatten(1).std(dim=1, keepdim=True).clamp(min=0.1)
        padded = nn.functional.pad(images - self.mean, (1, 1, 1, 1), mode="reflect")
        rows = padded[:, :, 1:-1, 1:-1].reshape(images.shape[0], -1)
        return self.linear(rows / scale) + torch.einsum("bi,ki->bk", rows, self.linear.weight)


def test_a_mixture_of_ours(tmp_path):
    """Its operators are moe_kernels'."""
    images, model = torch.rand(3, 1, 8, 8), dense_mixture().eval()
    shapes = ({0: torch.export.Dim("B", min=1)},)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.equal(load_program(tmp_path / "model.pt2")(images), model(images))


@pytest.mark.parametrize("model", [SmallNet(), WithoutGradients()], ids=["cnn", "further"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_computes_what_was_saved(model, dynamic, tmp_path):
    shapes = ({0: torch.export.Dim("B", min=1)},) if dynamic else None
    path = export(model, tmp_path / "model.pt2", dynamic_shapes=shapes)
    found = load_program(path)(IMAGES)
    assert torch.equal(found, model.eval()(IMAGES))


def use_pickle(files, mark):
    files[CONFIG]["config"]["conv.weight"] |= {"use_pickle": True, "tensor_meta": None}
    files["data/weights/weight_0"] = payload(mark)


def constant(name):
    def change(files, mark):
        described = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
        files["data/constants/model_constants_config.json"]["config"]["c"] = described
        raw = pickle.dumps(Payload(mark))
        files[f"data/constants/{name}"] = raw if name.startswith("opaque") else payload(mark)

    return change


def legacy(name):
    def change(files, mark):
        files[f"data/{name}/model.pt"] = payload(mark)

    return change


def target(text, *arguments):
    def change(files, mark):
        nodes = graph(files)["nodes"]
        inputs = [{"name": "a", "arg": {"as_string": a.format(mark)}, "kind": 1} for a in arguments]
        outputs, extra = [{"as_none": True}], {"metadata": {}, "name": "evil"}
        nodes.append({"target": text, "inputs": inputs, "outputs": outputs, **extra})

    return change


CALL = "__import__('os').system('touch {}')"


def size(files, mark):
    sizes = graph(files)["tensor_values"]["images"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = CALL.format(mark)


def guard(files, mark):
    files[PROGRAM]["guards_code"] = [CALL.format(mark) + " == 0"]


def input_name(files, mark):
    text = json.dumps(files[PROGRAM]).replace('"images"', json.dumps(f"i={CALL.format(mark)}"))
    files[PROGRAM] = json.loads(text)


def container(files, mark):
    signature = files[PROGRAM]["graph_module"]["module_call_graph"][0]["signature"]
    kind = {"type": "collections.defaultdict", "children_spec": []}
    context = {"default_factory_module": "evil", "default_factory_name": "x", "dict_context": []}
    signature["in_spec"] = json.dumps([1, kind | {"context": json.dumps(context)}])


ATTACKS = {
    "pickled weights": use_pickle,
    "pickled constant": constant("tensor_0"),
    "custom object": constant("custom_obj_0"),
    "opaque object": constant("opaque_obj_0"),
    "weights of an older torch": legacy("weights"),
    "constants of an older torch": legacy("constants"),
    "compiled library": lambda files, mark: files.update({"data/aotinductor/model/m.so": b"x"}),
    "function of Python": target("torch.os.system", "touch {}"),
    "function that loads": target("torch.ops.load_library", "{}"),
    "way out of an operator": target("torch.ops.aten.__init__.__globals__"),
    "operator module": target("_operator.methodcaller", "x"),
    "file that is mapped": target("torch.ops.aten.from_file.default", "{}"),
    "size": size,
    "name of an input": input_name,
    "container": container,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_it_runs(attack, saved, mark, tmp_path):
    path = rewritten(saved, tmp_path / "evil.pt2", lambda files: ATTACKS[attack](files, mark))
    with pytest.raises(CheckpointError, match=r"evil\.pt2: not an exported program"):
        load_program(path)(IMAGES)
    assert not mark.exists()


@pytest.mark.parametrize("attack", ["sample inputs", "guard"])
def test_what_is_left_out_does_not_matter(attack, saved, mark, tmp_path):
    change = {
        "sample inputs": lambda files, _: files.update({"data/sample_inputs/model.pt": payload(_)}),
        "guard": guard,
    }[attack]
    path = rewritten(saved, tmp_path / "evil.pt2", lambda files: change(files, mark))
    model = load_program(path)
    assert torch.equal(model(IMAGES), SmallNet().eval()(IMAGES))
    assert not mark.exists()


def test_older_format_as_a_fallback(mark, tmp_path):
    path = tmp_path / "evil.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.8")
        for name in ("exported_program.json", "state_dict.pt", "constants.pt", "example_inputs.pt"):
            archive.writestr(f"serialized_{name}", payload(mark))
    with pytest.raises(CheckpointError, match="not an exported program"):
        load_program(path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x05\x06" + 18 * b"\0"])
def test_no_archive(content, tmp_path):
    (tmp_path / "model.pt2").write_bytes(content)
    with pytest.raises(CheckpointError, match="not an exported program"):
        load_program(tmp_path / "model.pt2")


def test_damaged_weights(saved, tmp_path):
    path = tmp_path / "model.pt2"
    shutil.copy(saved, path)
    with zipfile.ZipFile(path) as archive:
        place = archive.infolist()[4].header_offset + 2000  # within the largest weight
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC"):
        load_program(path)
