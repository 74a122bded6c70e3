"""Small files in the formats of the field's data sets, as their authors or torchvision lay them out."""

import io
import json
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adamerge.data.benchmarks import definition

RAW = np.random.default_rng(0)


def encoded(kind: str = "JPEG", mode: str = "RGB", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RAW.integers(0, 256, (size, size, 3), dtype=np.uint8)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_all(folder: Path, names: Sequence[str], content: bytes) -> None:
    for name in names:
        put(folder / name, content)


def sun397(root: Path, per_class: int = 1) -> dict[str, int]:
    known = definition("sun397")
    folders = [f"{name[0]}/{name.replace(' ', '_')}" for name in known.classes]
    folders[known.classes.index("apartment building outdoor")] = "a/apartment_building/outdoor"
    counts = {}
    for split, listing in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        names = [f"{folder}/sun_{split}{number}.jpg" for folder in folders for number in range(per_class)]
        put_all(root / "SUN397", names, encoded())
        put(root / "SUN397" / listing, "".join(f"/{name}\n" for name in names))
        counts[split] = len(names)
    return counts


def cars(root: Path) -> dict[str, int]:
    from scipy.io import savemat

    base, classes = root / "stanford_cars", definition("cars").classes
    for split, annotations in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        names = [f"{number + 1:05d}.jpg" for number in range(len(classes))]
        put_all(base / f"cars_{split}", names, encoded())
        (base / annotations).parent.mkdir(exist_ok=True)
        rows = np.array([(label + 1, name) for label, name in enumerate(names)], dtype=[("class", "O"), ("fname", "O")])
        savemat(base / annotations, {"annotations": rows})
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(classes, dtype=object)})
    return {"train": len(classes), "test": len(classes)}


def resisc45(root: Path) -> dict[str, int]:
    folders, counts = [name.replace(" ", "_") for name in definition("resisc45").classes], {}
    for start, split in enumerate(("train", "val", "test")):
        names = [f"{folder}_{start + 1:03d}.jpg" for folder in folders]
        put_all(root / "resisc45/NWPU-RESISC45", [f"{n.rsplit('_', 1)[0]}/{n}" for n in names], encoded())
        put(root / f"resisc45/resisc45-{split}.txt", "\n".join(names) + "\n")
        counts[split] = len(names)
    return counts


EUROSAT = definition("eurosat").spelled


def eurosat(root: Path, per_class: int = 5) -> dict[str, int]:
    for folder in EUROSAT:
        images = [f"{folder}_{number + 1}.jpg" for number in range(per_class)]
        put_all(root / "eurosat/2750" / folder, images, encoded())
    return {"train": 10 * (per_class - 2), "val": 10, "test": 10}


def svhn(root: Path, folder: str = "svhn") -> dict[str, int]:
    from scipy.io import savemat

    (root / folder).mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        labels = np.arange(1, 11, dtype=np.uint8)[:, None]  # the digit 0 is 10 in the authors' files
        images = RAW.integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
        savemat(root / folder / f"{split}_32x32.mat", {"X": images, "y": labels})
    return {"train": 10, "test": 10}


def gtsrb(root: Path) -> dict[str, int]:
    base = root / "gtsrb"
    put_all(base / "GTSRB/Training", [f"{label:05d}/00000_00000.ppm" for label in range(43)], encoded("PPM"))
    names = [f"{number:05d}.ppm" for number in range(43)]
    put_all(base / "GTSRB/Final_Test/Images", names, encoded("PPM"))
    rows = [f"{name};8;8;0;0;7;7;{label}" for label, name in enumerate(names)]
    put(base / "GT-final_test.csv", "\n".join(["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId", *rows]))
    return {"train": 43, "test": 43}


def idx(array: np.ndarray) -> bytes:
    """LeCun's format: two zero bytes, the type (8: unsigned byte), the number of dimensions, their sizes, the data."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def _idx_files(folder: Path, train: str, test: str) -> dict[str, int]:
    for prefix, count in ((train, 20), (test, 10)):
        put(folder / f"{prefix}-images-idx3-ubyte", idx(RAW.integers(0, 256, (count, 28, 28))))
        put(folder / f"{prefix}-labels-idx1-ubyte", idx(np.arange(count) % 10))
    return {"train": 20, "test": 10}


def mnist(root: Path) -> dict[str, int]:
    return _idx_files(root / "MNIST/raw", "train", "t10k")


def fashion_mnist(root: Path) -> dict[str, int]:
    return _idx_files(root / "FashionMNIST/raw", "train", "t10k")


def kmnist(root: Path) -> dict[str, int]:
    return _idx_files(root / "KMNIST/raw", "train", "t10k")


def emnist(root: Path) -> dict[str, int]:
    return _idx_files(root / "EMNIST/raw", "emnist-digits-train", "emnist-digits-test")


def emnist_letters(root: Path) -> dict[str, int]:
    # Labels from 1, as NIST has them.
    counts = {"train": 52, "test": 26}
    for split, count in counts.items():
        start = root / f"EMNIST/raw/emnist-letters-{split}"
        put(start.with_name(f"{start.name}-images-idx3-ubyte"), idx(RAW.integers(0, 256, (count, 28, 28))))
        put(start.with_name(f"{start.name}-labels-idx1-ubyte"), idx(np.arange(count) % 26 + 1))
    return counts


def dtd(root: Path) -> dict[str, int]:
    classes = definition("dtd").classes
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{name}/{name}_{number:04d}.jpg" for name in classes]
        put_all(root / "dtd/dtd/images", names, encoded())
        put(root / f"dtd/dtd/labels/{split}1.txt", "\n".join(names) + "\n")
    return dict.fromkeys(("train", "val", "test"), len(classes))


def cifar100(root: Path) -> dict[str, int]:
    base, known = root / "cifar-100-python", definition("cifar100")
    for split, count in (("train", 200), ("test", 100)):
        images, labels = RAW.integers(0, 256, (count, 3072), dtype=np.uint8), [i % 100 for i in range(count)]
        put(base / split, pickle.dumps({"data": images, "fine_labels": labels}))
    put(base / "meta", pickle.dumps({"fine_label_names": [name.replace(" ", "_") for name in known.classes]}))
    return {"train": 200, "test": 100}


def cifar10(root: Path) -> dict[str, int]:
    base = root / "cifar-10-batches-py"
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {"data": RAW.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        put(base / name, pickle.dumps(content))
    put(base / "batches.meta", pickle.dumps({"label_names": list(definition("cifar10").classes)}))
    return {"train": 50, "test": 10}


def stl10(root: Path) -> dict[str, int]:
    base = root / "stl10_binary"
    for name, count in (("train", 20), ("test", 10), ("unlabeled", 2)):
        put(base / f"{name}_X.bin", RAW.integers(0, 256, count * 3 * 96 * 96, dtype=np.uint8).tobytes())
        if name != "unlabeled":
            put(base / f"{name}_y.bin", (np.arange(count, dtype=np.uint8) % 10 + 1).tobytes())
    put(base / "class_names.txt", "\n".join(definition("stl10").classes) + "\n")
    return {"train": 20, "test": 10}


def flowers102(root: Path) -> dict[str, int]:
    from scipy.io import savemat

    base = root / "flowers-102"
    put_all(base / "jpg", [f"image_{number:05d}.jpg" for number in range(1, 307)], encoded())
    savemat(base / "imagelabels.mat", {"labels": np.arange(306) % 102 + 1})
    numbers = np.arange(1, 307)
    savemat(base / "setid.mat", {"trnid": numbers[:102], "valid": numbers[102:204], "tstid": numbers[204:]})
    return {"train": 102, "val": 102, "test": 102}


def oxford_iiit_pet(root: Path) -> dict[str, int]:
    base, counts = root / "oxford-iiit-pet", {}
    for split, listing in (("train", "trainval"), ("test", "test")):
        lines = []
        for label, name in enumerate(definition("oxford_iiit_pet").classes):
            image = f"{name.replace(' ', '_')}_{split}"  # the authors write dogs without capitals, torchvision does not
            put(base / f"images/{image}.jpg", encoded())
            lines.append(f"{image} {label + 1} 1 1")
        put(base / f"annotations/{listing}.txt", "\n".join(lines) + "\n")
        counts[split] = len(lines)
    return counts


def pcam(root: Path) -> dict[str, int]:
    import h5py

    (root / "pcam").mkdir(parents=True)
    for split in ("train", "valid", "test"):
        for kind, key, shape in (("x", "x", (4, 96, 96, 3)), ("y", "y", (4, 1, 1, 1))):
            values = RAW.integers(0, 256 if kind == "x" else 2, shape, dtype=np.uint8)
            with h5py.File(root / f"pcam/camelyonpatch_level_2_split_{split}_{kind}.h5", "w") as file:
                file[key] = values
    return {"train": 4, "val": 4, "test": 4}


def fer2013(root: Path) -> dict[str, int]:
    rows, usages = [], ("Training", "Training", "PublicTest", "PrivateTest")
    for number in range(28):
        pixels = " ".join(map(str, RAW.integers(0, 256, 48 * 48)))
        rows.append(f"{number % 7},{pixels},{usages[number // 7]}")
    put(root / "fer2013/fer2013.csv", "\n".join(["emotion,pixels,Usage", *rows]) + "\n")
    return {"train": 14, "test": 14}


def food101(root: Path) -> dict[str, int]:
    classes = [name.replace(" ", "_") for name in definition("food101").classes]
    for number, split in enumerate(("train", "test")):
        put_all(root / "food-101/images", [f"{name}/{number}.jpg" for name in classes], encoded())
        put(root / f"food-101/meta/{split}.json", json.dumps({name: [f"{name}/{number}"] for name in classes}))
    return {"train": 101, "test": 101}


def rendered_sst2(root: Path) -> dict[str, int]:
    for folder in ("train", "valid", "test"):
        put_all(root / "rendered-sst2" / folder, ["negative/0.png", "positive/0.png"], encoded("PNG"))
    return {"train": 2, "val": 2, "test": 2}


MAKERS: dict[str, Callable[[Path], dict[str, int]]] = {
    maker.__name__: maker
    for maker in (
        *(sun397, cars, resisc45, eurosat, svhn, gtsrb, mnist, dtd, stl10, oxford_iiit_pet, flowers102, cifar100),
        *(pcam, fer2013, cifar10, food101, fashion_mnist, rendered_sst2, emnist, kmnist, emnist_letters),
    )
}


def make(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Make a data set, and let it be known as the small one it is: its counts, and any checksum."""
    counts = MAKERS[name](root)
    for split, count in counts.items():
        monkeypatch.setitem(definition(name).splits, split, count)
    for layout in definition(name).layouts:
        for split in layout.divide:
            monkeypatch.setitem(layout.divide, split, 1)
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_, **__: True)
    return counts
