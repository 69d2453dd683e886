"""The images of a table: inside its parquet files, named by path or address, or in a table of images by id."""

from collections import defaultdict
from pathlib import Path

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import Image, StoredImage, image_digests
from lever_lm.data.image_download import find_images, is_address
from lever_lm.data.parquet_files import image_folders
from lever_lm.data.rows import Unusable
from lever_lm.data.table.cells import holds_nothing, id_of
from lever_lm.data.table.columns import ROLES, there
from lever_lm.data.table.files import open_table
from lever_lm.data.table.parts import Part, Table
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import HUB_PREFIX
from lever_lm.utils.terminal import one_line, shown


class PlacedImages:
    """The images that the rows of a table name by path or address, each looked up once.

    remote: False to fetch none now, even where `data.allow_remote` says so. Raises LeverError as find_images does."""

    def __init__(self, table: Table, column: str, config: DataConfig, *, stop_early: bool, remote: bool = True):
        import datasets

        self._column, self._unfetched = column, config.allow_remote and not remote
        named: dict[Path | None, dict[str, None]] = defaultdict(dict)
        for part in table.parts if column else ():
            places = named[part.folder]
            for row in part.rows([column], column):
                if isinstance(place := row.cells.get(column), str):
                    places[place] = None
        self._files: dict[tuple[Path | None, str], str] = {}
        self._problems: dict[tuple[Path | None, str], str] = {}
        for folder, places in named.items():
            files, problems = find_images(
                filter(str.strip, places),
                *image_folders(folder, config.coco_path, of_hub=table.source.startswith(HUB_PREFIX)),
                Path(datasets.config.HF_DATASETS_CACHE) / "lever_lm_images",
                allow_remote=config.allow_remote and remote,
                stop_early=stop_early,
            )
            self._files |= {(folder, place): file for place, file in files.items()}
            self._problems |= {(folder, place): problem for place, problem in problems.items()}
        if remote:
            image_digests(list(dict.fromkeys(self._files.values())))  # of all at once, and kept

    def of(self, part: Part, cells: dict) -> Image | None:
        """Return the image of a row, None where it has none. Raises Unusable."""
        place = cells.get(self._column) if self._column else None
        if isinstance(place, StoredImage):
            return place
        if holds_nothing(place):
            return None
        if not isinstance(place, str):
            raise Unusable(f"its image must be a path, found {shown(place)} (column {one_line(self._column)})")
        if (file := self._files.get((part.folder, place))) is None and not (self._unfetched and is_address(place)):
            raise Unusable(self._problems[part.folder, place])
        return file or place


class ImageTable:
    """The images of `data.image_table` by id, for rows that name theirs by the id alone. In its address, `{split}`
    stands for `train` or `val`. remote: False to fetch nothing now, neither a table nor an image."""

    def __init__(self, config: DataConfig, split: str, column: str, *, stop_early: bool, remote: bool = True):
        if not column:
            raise LeverError(
                "data.image_table has images by id, but the rows have no column of image ids; name it: --set "
                "data.columns.image_id=NAME"
            )
        table = open_table(config.image_table.replace("{split}", split), "data.image_table", fetch=remote)
        lower = {name.strip().lower(): name for name in reversed(table.columns)}
        image, own_id = (next((lower[name] for name in ROLES[role] if name in lower), "") for role in ("image", "id"))
        own_id = own_id or lower.get("image_id", "")
        if not image or not own_id:
            raise LeverError(
                f"{table.source} must have the columns id and image, found {there(table)} (data.image_table)"
            )
        self._source, self._column, self._by_id = table.source, column, {}
        placed = PlacedImages(table, image, config, stop_early=stop_early, remote=remote)
        for part in table.parts:
            for row in part.rows([own_id, image], image):
                try:
                    if (found := placed.of(part, row.cells)) is not None:
                        self._by_id[id_of(row.cells.get(own_id))] = found
                except Unusable as error:
                    raise LeverError(f"{part.where(row.number)}: {error} (data.image_table)") from error

    def of(self, part: Part, cells: dict) -> Image | None:
        """Return the image of a row, None where it names none. Raises Unusable."""
        cell = cells.get(self._column)
        if holds_nothing(cell):
            return None
        if (found := self._by_id.get(id_of(cell))) is None:
            raise Unusable(f"its image {shown(cell)} is not in {self._source} (data.image_table)")
        return found
