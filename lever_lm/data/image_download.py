"""Images that a table names instead of holding: paths inside named folders, and, where allowed, addresses fetched once.

An address is asked for without cookies or keys. What comes is kept if it is an image, under the digest of its address.
"""

import hashlib
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.cookiejar import CookieJar, DefaultCookiePolicy
from io import BytesIO
from pathlib import Path

from lever_lm.data.image_decode import Undecodable, decoded
from lever_lm.utils.atomic_io import atomic_file
from lever_lm.utils.locks import alone
from lever_lm.utils.terminal import one_line, shown

MAX_BYTES = 64 << 20  # of an image that is fetched
CONNECTIONS = 8
TIMEOUT = 30.0  # seconds for a connection, for a silence, and for a whole image
_TRIES = 3
_REDIRECTS = 5
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:|.*::", re.DOTALL)  # a drive's letter is no scheme
_FETCHABLE = re.compile(r"https?://[^\s/?#\\]\S*")
_MAY_PASS = (408, 429, 500, 502, 503, 504)


class Refused(Exception):
    """An address gives no image; says why."""


class _MayPass(Refused):
    """A download failed in a way that is worth another try."""


def find_images(
    places: Iterable[str],
    roots: Sequence[Path],
    within: Sequence[Path],
    cache: Path,
    *,
    allow_remote: bool,
    stop_early: bool,
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the image file of each place that a table names, and of the others why there is none.

    A path is looked for in the folders `roots`, and must lie in one of `within` once links are followed. An address is
    fetched into `cache` with allow_remote, each once; with stop_early nothing is asked for after the first failure.
    """
    files, problems, remote = {}, {}, []
    for place in dict.fromkeys(places):
        if not is_address(place):
            if path := _local_image(place, roots, within):
                files[place] = path
            else:
                problems[place] = (
                    f"its image {one_line(place)!r:.200} is no file in the folder of the data or in that of COCO_PATH "
                    "(data.coco_path); name the folder that holds it: --set data.coco_path=DIR"
                )
        elif not _FETCHABLE.fullmatch(place):
            problems[place] = f"its image is at {shown(place, 80)}, which is never followed"
        elif not allow_remote:
            problems[place] = f"its image is at {shown(place, 80)}, which is followed with --allow-remote alone"
        else:
            remote.append(place)
    failed = _fetch_images(remote, cache, stop_early)
    files |= {place: str(_cache_file(place, cache)) for place in remote if place not in failed}
    return files, problems | {place: f"its image {shown(place, 200)}: {why}" for place, why in failed.items()}


def is_address(place: str) -> bool:
    """Return whether an image's place is something other than a path."""
    return _ADDRESS.match(place) is not None


def _local_image(place: str, roots: Sequence[Path], within: Sequence[Path]) -> str | None:
    for path in (root / place for root in roots):
        try:
            real = path.resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # not there, a name that no file can have, a circle of links
            continue
        if real.is_file() and any(real.is_relative_to(folder) for folder in within):
            return str(path)
    return None


def _cache_file(address: str, folder: Path) -> Path:
    return folder / hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _fetch_images(addresses: Sequence[str], folder: Path, stop_early: bool) -> dict[str, str]:
    """Fetch the images that are not in the folder yet. Returns the addresses that gave none, with the reason."""
    import httpx2

    problems: dict[str, str] = {}
    if all(_cache_file(address, folder).is_file() for address in addresses):
        return problems
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    client = httpx2.Client(
        headers={"Accept": "image/*", "Accept-Encoding": "identity"},
        cookies=no_cookies,
        timeout=TIMEOUT,
        follow_redirects=True,
        max_redirects=_REDIRECTS,
    )

    def fetch(address: str) -> None:
        file = _cache_file(address, folder)
        if file.is_file() or (stop_early and problems):
            return
        try:
            _keep(_tried(client, address), file)
        except Refused as error:
            problems[address] = str(error)

    # Another process may be fetching the same.
    with alone(folder / ".lock", str(folder), "wait", wait=True), client, ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(fetch, addresses))
    return problems


def _keep(content: bytes, path: Path) -> None:
    try:
        decoded(BytesIO(content))
    except Undecodable as error:
        raise Refused(f"what came is no image: {error}") from error
    with atomic_file(path) as file:
        file.write(content)


def _tried(client, address: str) -> bytes:
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

    tries = Retrying(
        retry=retry_if_exception_type(_MayPass),
        stop=stop_after_attempt(_TRIES),
        wait=wait_random_exponential(multiplier=1, max=10),
        reraise=True,
    )
    return tries(_fetch, client, address)


def _fetch(client, address: str) -> bytes:
    """Return the body that an address leads to. Raises Refused."""
    import httpx2

    content, end = bytearray(), time.monotonic() + TIMEOUT
    try:
        with client.stream("GET", address) as response:
            if (status := response.status_code) != 200:
                raise (_MayPass if status in _MAY_PASS else Refused)(f"its server answered {status}")
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise Refused(f"it is larger than {MAX_BYTES >> 20} MiB")
                if time.monotonic() > end:
                    raise _MayPass(f"it did not come within {TIMEOUT:g} s")
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.TooManyRedirects, ValueError) as error:
        raise Refused(f"its address leads nowhere ({one_line(str(error)):.100})") from error
    except httpx2.HTTPError as error:
        raise _MayPass(f"nothing came ({one_line(str(error))[:100] or type(error).__name__})") from error
    return bytes(content)
