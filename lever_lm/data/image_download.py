"""Images that a table names instead of holding: paths inside named folders, and, where allowed, addresses fetched once.

An address is asked for without cookies or keys. What comes is kept if it is an image, under the digest of its address.
"""

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from lever_lm.data.image_decode import Undecodable, decoded
from lever_lm.utils.atomic_io import atomic_file
from lever_lm.utils.locks import alone
from lever_lm.utils.terminal import one_line

MAX_BYTES = 64 << 20  # of an image that is fetched
CONNECTIONS = 8
TIMEOUT = 30.0  # seconds for a whole image
_TRIES = 3
_REDIRECTS = 5
_SILENT = 5  # addresses of a host that nothing came from, after which it is not asked any more
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:|.*::", re.DOTALL)  # a drive's letter is no scheme


class Refused(Exception):
    """An image is not taken from the place that a table names; says why."""


class _MayPass(Exception):
    """A download failed in a way that is worth another try."""


def is_address(place: str) -> bool:
    """Return whether an image's place is something other than a path."""
    return _ADDRESS.match(place) is not None


def is_fetchable(place: str) -> bool:
    """Return whether an address can be allowed: http or https, with a host."""
    try:
        parts = urlsplit(place)
        sound = bool(parts.hostname) and parts.port != 0 and place.isprintable()
        return sound and parts.scheme in ("http", "https")
    except ValueError:
        return False


def local_image(place: str, roots: Sequence[Path], within: Sequence[Path]) -> str:
    """Return the file that a path names, from the first of the folders `roots` that has it. Raises Refused where, links
    followed, it is in none of the folders `within`."""
    try:
        found = [path for root in roots if (path := root / place).exists()]
        for path in found:
            if any(path.resolve().is_relative_to(root) for root in within):
                if not path.is_file():
                    raise Refused(f"its image {one_line(place)!r:.200} is no regular file")
                return str(path)
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, a circle of links
        why = getattr(error, "strerror", None) or "no path can be so"
        raise Refused(f"its image {one_line(place)!r:.200} cannot be looked up: {why}") from error
    where = "outside" if found or Path(place).is_absolute() or ".." in Path(place).parts else "not in"
    raise Refused(
        f"its image {one_line(place)!r:.200} is {where} the folder of the data and that of COCO_PATH "
        "(data.coco_path); name the folder that holds it there"
    )


def cache_file(address: str, folder: Path) -> Path:
    """Return the file that keeps the image fetched from an address."""
    return folder / hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def fetch_images(addresses: Iterable[str], folder: Path, *, stop_early: bool = False) -> dict[str, str]:
    """Fetch the images that are not in the folder yet, each address once. Returns the addresses that gave no image,
    with the reason; with `stop_early` nothing is asked for after the first of them."""
    wanted = [address for address in dict.fromkeys(addresses) if not cache_file(address, folder).is_file()]
    if not wanted:
        return {}
    with alone(folder / ".lock", str(folder), "wait", wait=True):  # another process may be fetching the same
        wanted = [address for address in wanted if not cache_file(address, folder).is_file()]
        return asyncio.run(_fetch_all(wanted, folder, stop_early))


async def _fetch_all(addresses: list[str], folder: Path, stop_early: bool) -> dict[str, str]:
    import httpx2

    problems: dict[str, str] = {}
    silent: Counter = Counter()
    waiting = iter(addresses)
    headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
    async with httpx2.AsyncClient(headers=headers, timeout=TIMEOUT, follow_redirects=False) as client:

        async def work() -> None:
            for address in waiting:
                if stop_early and problems:
                    return
                host = urlsplit(address).netloc
                try:
                    if silent[host] >= _SILENT:
                        raise Refused("nothing came from its host before")
                    content = await _tried(client, address)
                    silent[host] = -len(addresses)  # it is there
                    await asyncio.to_thread(_keep, content, cache_file(address, folder))
                except _MayPass as error:
                    silent[host] += 1
                    problems[address] = f"{error}, {_TRIES} times"
                except Refused as error:
                    problems[address] = str(error)

        await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
    return problems


def _keep(content: bytes, path: Path) -> None:
    try:
        decoded(BytesIO(content))
    except Undecodable as error:
        raise Refused(f"what came is no image: {error}") from error
    with atomic_file(path) as file:
        file.write(content)


async def _tried(client, address: str) -> bytes:
    from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

    tries = AsyncRetrying(
        retry=retry_if_exception_type(_MayPass),
        stop=stop_after_attempt(_TRIES),
        wait=wait_random_exponential(multiplier=1, max=10),
        reraise=True,
    )
    return await tries(_fetch, client, address)


async def _fetch(client, address: str) -> bytes:
    """Return the body that an address leads to. Raises Refused, or _MayPass."""
    import httpx2

    try:
        for _ in range(_REDIRECTS):
            status, target, content = await asyncio.wait_for(_exchange(client, address), TIMEOUT)
            if target is None:
                break
            target = urljoin(address, target)
            if not is_fetchable(target) or (address.startswith("https:") and not target.startswith("https:")):
                raise Refused(f"it is redirected to {one_line(target):.100}")
            address = target
        else:
            raise Refused("it is redirected over and over")
    except asyncio.TimeoutError as error:
        raise _MayPass(f"it did not come within {TIMEOUT:g} s") from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError, ValueError) as error:
        raise Refused(f"its address cannot be asked for ({one_line(str(error)):.100})") from error
    except httpx2.HTTPError as error:
        raise _MayPass(f"nothing came ({one_line(str(error))[:100] or type(error).__name__})") from error
    if status == 200:
        return content
    raise (_MayPass if status >= 500 or status in (408, 429) else Refused)(f"its server answered {status}")


async def _exchange(client, address: str) -> tuple[int, str | None, bytes]:
    """Return the status, the target of a redirect, and the body of a success."""
    client.cookies.clear()
    async with client.stream("GET", address) as response:
        status, content = response.status_code, bytearray()
        if 300 <= status < 400:
            return status, response.headers.get("location"), b""
        if status == 200:
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise Refused(f"it is larger than {MAX_BYTES >> 20} MiB")
        return status, None, bytes(content)
