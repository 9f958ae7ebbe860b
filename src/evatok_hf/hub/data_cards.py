"""Parts that the cards of data sets share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import DatasetCard, DatasetCardData

from .. import __version__
from .card import PAPER, render
from .commit import REPO_ID

if TYPE_CHECKING:
    from datasets import Features

PAPER_TAG = f"arxiv:{PAPER}"
# Of huggingface/hub-docs, August 2026.
LICENCES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other""".split()
)
SIZES = ("n<1K 1K<n<10K 10K<n<100K 100K<n<1M 1M<n<10M 10M<n<100M 100M<n<1B 1B<n<10B 10B<n<100B 100B<n<1T n>1T").split()


def check_licence(licence: str) -> None:
    """Raises ValueError for what the Hub does not know."""
    if licence not in LICENCES:
        raise ValueError(
            f"--licence {licence!r} is none of the Hub's; use an identifier such as cc-by-4.0 or mit, or other."
        )


def render_template(path: Path, data: DatasetCardData, features: Features, **facts: object) -> str:
    """A template with its front matter and these facts, none missing, among them the types of the columns in words; the
    front matter parses."""
    types = {column: describe(feature) for column, feature in features.items()}
    text = render(path, **{**facts, "card_data": data.to_yaml(), "types": types})
    DatasetCard(text)
    return text


def front_matter(
    licence: str,
    features: Features,
    splits: Mapping[str, tuple[str, int, int]],
    download_size: int,
    sources: Sequence[str] = (),
    **fields: object,
) -> DatasetCardData:
    """The front matter of a data set card.

    Args:
        licence: identifier of the Hub.
        features: of the rows.
        splits: name -> (pattern of its files, rows, their bytes when read).
        download_size: bytes of all files of rows.
        sources: data sets of the Hub that it was made from.
        fields: further ones, such as pretty_name, tags and task_categories.
    """
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict
    from datasets.splits import SplitDict, SplitInfo

    counted = SplitDict()
    for name, (_, rows, size) in splits.items():
        counted.add(SplitInfo(name, num_bytes=size, num_examples=rows))
    read = sum(size for _, _, size in splits.values())
    info = DatasetInfo(features=features, splits=counted, download_size=download_size, dataset_size=read)
    data = DatasetCardData(
        license=licence,
        license_name="as-the-sources" if licence == "other" else None,
        annotations_creators=["machine-generated"],
        size_categories=[size_category(sum(rows for _, rows, _ in splits.values()))],
        source_datasets=list(sources) or ["original"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": pattern} for name, (pattern, _, _) in splits.items()],
            }
        ],
        **fields,
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data


def size_category(rows: int) -> str:
    """The Hub's word for so many rows."""
    return next((name for power, name in enumerate(SIZES[:-1], 3) if rows < 10**power), SIZES[-1])


def parquet_sizes(shards: Sequence[Path]) -> tuple[int, int]:
    """Bytes of Parquet files, and of their rows when they are read."""
    import pyarrow.parquet as pq

    read = 0
    for path in shards:
        metadata = pq.read_metadata(path)
        read += sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return sum(path.stat().st_size for path in shards), read


def describe(feature: object) -> str:
    """The type of a column in words."""
    from datasets import Array2D, ClassLabel, List

    if isinstance(feature, ClassLabel):
        return f"class label ({feature.num_classes})"
    if isinstance(feature, List):
        length = "list of" if feature.length < 0 else f"{feature.length} x"
        return f"{length} {describe(feature.feature)}"
    if isinstance(feature, Array2D):
        return f"{feature.dtype} {tuple(feature.shape)}"
    return getattr(feature, "dtype", None) or type(feature).__name__.lower()


def hub_ids(*names: str | None) -> list[str]:
    """The sources among these that are data sets of the Hub: written owner/name, and no file or folder."""
    return [name for name in dict.fromkeys(names) if name and REPO_ID.fullmatch(name) and not Path(name).exists()]


def versions() -> dict[str, str]:
    """Versions of the packages that a data set depends on, those that are installed."""
    found = {"evatok_hf": __version__}
    for name in ("torch", "datasets", "numpy", "av"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def in_words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
