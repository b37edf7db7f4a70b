"""Two replicas of a model behind one address, on this machine, with Ray Serve: pip install 'autodeploy[serve,ray]'."""

import sys

import httpx
import ray
from ray import serve

import autodeploy.ray

ADDRESS = {"host": "127.0.0.1", "port": 8000}


def main(model: str = "smollm2") -> None:
    """Start both, ask whole and as a stream, stop them."""
    ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
    serve.start(http_options=ADDRESS)
    serve.run(autodeploy.ray.app({"model": model, "num_replicas": 2, "served_model_name": "model"}))
    url = "http://{host}:{port}/v1/completions".format(**ADDRESS)
    body = {"model": "model", "prompt": "The capital of France is", "max_tokens": 16}
    print(httpx.post(url, json=body, timeout=300).json()["choices"][0]["text"])
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=300) as response:
        for line in response.iter_lines():
            print(line)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
