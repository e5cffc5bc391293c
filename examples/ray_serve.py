"""Vectors over HTTP with Ray Serve: requests that come at the same time share one call.

Needs ``pip install "prunepass[bulk,openvino]" "ray[serve]"``, and a folder of ``prunepass export ... --pooled``:

    python examples/ray_serve.py FOLDER
    curl -H 'content-type: application/json' -d '{"texts": ["A cat sat on the mat."]}' http://127.0.0.1:8000/

Each replica holds one compiled model and runs it on the cores that Ray gives it. OpenVINO and ONNX Runtime do not
listen to Ray, so the number is said twice: to Ray, and to the embedder.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from ray import serve

from prunepass.bulk import Embedder

CPUS = 2


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": CPUS}, max_ongoing_requests=64)
class Vectors:
    """One replica: texts in, vectors out."""

    def __init__(self, folder: str) -> None:
        self.embedder = Embedder(folder, cpus=CPUS, truncate=True)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)
    async def vectors(self, requests: list[list[str]]) -> list[list[list[float]]]:
        """Of the texts of all requests that are there, in one call; each request gets its own back."""
        texts = [text for request in requests for text in request]
        # the event loop goes on taking requests while the model runs
        found = iter((await asyncio.to_thread(self.embedder, texts)).tolist())
        return [[next(found) for _ in request] for request in requests]

    async def __call__(self, request: Any) -> Any:
        """``{"texts": [...]}`` -> ``{"vectors": [...]}``; anything else is answered with 400 and what to send."""
        from starlette.responses import JSONResponse

        try:
            texts = (await request.json())["texts"]
        except (ValueError, KeyError, TypeError):
            texts = None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return JSONResponse({"error": 'Send JSON such as {"texts": ["A cat sat on the mat."]}.'}, status_code=400)
        return {"vectors": await self.vectors(texts) if texts else []}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of prunepass export --pooled")
    serve.run(Vectors.bind(parser.parse_args().folder))
    print("Serving at http://127.0.0.1:8000/. End with Ctrl-C.", flush=True)
    while True:
        time.sleep(3600)
