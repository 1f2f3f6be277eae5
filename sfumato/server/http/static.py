"""The page's files, each compressed once, for every client that takes gzip.

Answers never pass here, so that no event of a stream waits in a compressor.
"""

from __future__ import annotations

import gzip
import os
from functools import lru_cache

from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope


class PageFiles(StaticFiles):
    """A folder of text files, over HTTP."""

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        """A file whole, compressed, or not at all where the client has it already."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["vary"] = "Accept-Encoding"
        if not isinstance(response, FileResponse) or not _takes_gzip(Headers(scope=scope)):
            return response
        headers = dict(response.headers) | {"content-encoding": "gzip"}
        headers["etag"] = f"W/{headers['etag']}"  # the same file, in other bytes
        del headers["content-length"], headers["accept-ranges"]
        return Response(_compressed(os.fspath(full_path), stat_result.st_mtime), status_code, headers)


def _takes_gzip(headers: Headers) -> bool:
    codings = [coding.replace(" ", "") for coding in headers.get("accept-encoding", "").lower().split(",")]
    return any(coding.partition(";")[0] == "gzip" and not coding.endswith(";q=0") for coding in codings)


@lru_cache(maxsize=64)
def _compressed(path: str, modified: float) -> bytes:
    """A file's bytes as gzip; `modified`, its time, makes a new entry of a file that has changed."""
    with open(path, "rb") as file:
        return gzip.compress(file.read(), 9, mtime=0)
