"""`drllm-fast serve`: an OpenAI-compatible server."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drllm_fast.cli_models import SMOLLM2, Dtype, check_model, find_device
from drllm_fast.cli_policies import POLICY_HELP, parse_policy

if TYPE_CHECKING:
    from drllm_fast.serving.settings import ServerSettings
    from drllm_fast.serving.start import EngineSpec

HTTP, LIMITS, CLUSTER = "The server", "Limits", "Ray Serve"


def serve(
    model: Annotated[str, typer.Option(help=f"Model folder or hub id; the bundled one: {SMOLLM2}.")],
    policy: Annotated[str, typer.Option(help=POLICY_HELP)] = "dense",
    budget: Annotated[
        float | None, typer.Option(help="Share of the dense model's blocks, in (0, 1]; requests may bring their own.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto is the checkpoint's own.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")] = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Prompts that decode together.")] = 64,
    kv_gib: Annotated[float | None, typer.Option(help="Memory for keys and values, in GiB.")] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The same in tokens of one layer; default: 1024 tokens a prompt, for all layers."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.", rich_help_panel=HTTP)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0: a free one, which is printed.", rich_help_panel=HTTP)
    ] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model for clients; default: that of --model.", rich_help_panel=HTTP)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="DRLLM_FAST_API_KEY",
            help="Asked of every client; better in the environment, where other users do not see it.",
            rich_help_panel=HTTP,
        ),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds for running requests at the end.", rich_help_panel=HTTP)
    ] = 30.0,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests that wait or run; more get 429.", rich_help_panel=LIMITS)
    ] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds for a request.", rich_help_panel=LIMITS)] = 120.0,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="New tokens that a request may ask for.", rich_help_panel=LIMITS)
    ] = 1024,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Of one prompt.", rich_help_panel=LIMITS)] = 8192,
    max_body: Annotated[
        int, typer.Option(min=1, help="Bytes of a request's body.", rich_help_panel=LIMITS)
    ] = 256 << 10,
    ray: Annotated[bool, typer.Option("--ray", help="Run under Ray Serve.", rich_help_panel=CLUSTER)] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Copies of the model; default: 1.", rich_help_panel=CLUSTER)
    ] = None,
    autoscale: Annotated[
        str | None, typer.Option(help="MIN:MAX copies, by load, in place of --replicas.", rich_help_panel=CLUSTER)
    ] = None,
    replica_cpus: Annotated[
        float | None, typer.Option(min=0, help="CPUs of a replica; default: 1.", rich_help_panel=CLUSTER)
    ] = None,
    replica_gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs of a replica; default: 0.", rich_help_panel=CLUSTER)
    ] = None,
) -> None:  # fmt: skip
    """Serve a model over HTTP as OpenAI's API does: chat and text completions, streams, metrics.

    Each prompt runs its own layers, as the policy and the budget say.
    """
    parse_policy(policy, budget)
    check_model(model)
    scaling = _autoscale(autoscale, replicas)
    if not ray and any(given is not None for given in (replicas, autoscale, replica_cpus, replica_gpus)):
        raise typer.BadParameter("--replicas, --autoscale, --replica-cpus and --replica-gpus are for --ray")
    if None not in (kv_gib, kv_tokens):
        raise typer.BadParameter("give --kv-gib or --kv-tokens, not both")
    for option, value in (("--kv-gib", kv_gib), ("--timeout", timeout)):
        if value is not None and not value > 0:
            raise typer.BadParameter(f"{option} {value}: must be above 0")
    if not ray:  # replicas may have what this machine has not
        find_device(device)
    _check_packages(ray)

    from drllm_fast.serving.settings import ServerSettings
    from drllm_fast.serving.start import EngineSpec

    spec = EngineSpec(
        model=model, policy=policy, budget=budget, dtype=dtype.value, device=device, max_batch=max_batch,
        kv_tokens=kv_tokens, kv_gib=kv_gib, max_requests=max_queue, max_prompt_tokens=max_prompt_tokens,
    )  # fmt: skip
    settings = ServerSettings(
        model=name or (Path(model).resolve().name if Path(model).is_dir() else model), max_body_bytes=max_body,
        max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, timeout=timeout, api_key=api_key,
    )  # fmt: skip
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("drllm_fast").setLevel(logging.INFO)
    if ray:
        options = {k: v for k, v in (("num_cpus", replica_cpus), ("num_gpus", replica_gpus)) if v is not None}
        _serve_on_ray(spec, settings, host, port, replicas or 1, scaling, grace, options)
    else:
        _serve_here(spec, settings, host, port, grace)


def _serve_here(spec: EngineSpec, settings: ServerSettings, host: str, port: int, grace: float) -> None:
    from drllm_fast.serving.server import Server, listen
    from drllm_fast.serving.start import start_worker

    socket = listen(host, port)  # before the model is loaded: that a port is taken is known at once
    with socket:
        worker = start_worker(spec)
        try:
            socket.listen(2048)  # what connects from now on waits until the server takes it
            _say(settings, host, socket.getsockname()[1])
            Server(worker, settings, grace, log_level="warning").run(sockets=[socket])
        finally:
            worker.close()


def _serve_on_ray(
    spec: EngineSpec,
    settings: ServerSettings,
    host: str,
    port: int,
    replicas: int,
    autoscale: tuple[int, int] | None,
    grace: float,
    actor_options: dict[str, float],
) -> None:
    import signal
    import threading

    import ray
    from ray import serve

    from drllm_fast.serving.ray_serve import APP, application
    from drllm_fast.serving.server import listen

    with listen(host, port) as socket:  # Serve's proxy is another process, which is told the number
        port = socket.getsockname()[1]
    ray.init(ignore_reinit_error=True)
    serve.start(http_options={"host": host, "port": port})
    app = application(
        spec, settings, replicas=replicas, autoscale=autoscale, grace=grace, actor_options=actor_options
    )  # fmt: skip
    try:
        serve.run(app, name=APP, route_prefix="/")
        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        _say(settings, host, port)
        while not ended.wait(1):
            pass
    finally:
        serve.delete(APP)  # replicas finish what they have
        ray.shutdown()


def _say(settings: ServerSettings, host: str, port: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"{settings.model} at http://{shown}:{port}/v1, metrics at /metrics; end with ctrl-C")


def _autoscale(text: str | None, replicas: int | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if replicas is not None:
        raise typer.BadParameter("give --replicas or --autoscale, not both")
    found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    if found is None or int(found[2]) < max(1, int(found[1])):
        raise typer.BadParameter(f"--autoscale {text}: write MIN:MAX, such as 1:4")
    return int(found[1]), int(found[2])


def _check_packages(ray: bool) -> None:
    """Before a model is loaded."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f'serving needs {error.name}: pip install "drllm-fast[serve]"') from error
    if ray:
        try:
            from ray import serve  # noqa: F401
        except ImportError as error:
            raise ImportError('--ray needs Ray Serve: pip install "drllm-fast[ray-serve]"') from error
