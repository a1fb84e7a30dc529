"""Server mode: ``swift rollout`` takes each policy's adapter, all of it or nothing. The protocol: docs/servers.md.

In the order of the data. In the trainer, trainer/::

    writer.py      stages one trainer's adapter and gives it a version; sends the base where the servers have another
    remote.py      the servers as one engine: what a sync, the gate and a rollout ask; all of them switch, or none
    parcel.py      one policy to send: a buffer on the device, and host memory when a server needs that
    client.py      the calls: deadlines, retries, errors that name the server; nccl.py: ms-swift's connections

On both sides::

    wire.py        what travels; hosts.py: who is alive; shared.py: memory that another process opens

In each server, rollout/::

    installing.py  whether this server takes policies
    routes.py      in the web server's process: the state of a server; all workers do something, or none
    guard.py       around ms-swift's own routes; requests.py: limits and refusals; pipes.py: one order at a time
    worker.py      in each ``llm_worker``: passes orders on, and tags rollouts with what they come from
        receiver.py    in each of vLLM's workers: checks (checks.py, base.py), then from NCCL or memory into the LoRA
                       slots; extension.py: its entry

The hooks are in frameworks/swift/server_hooks.py. Importing this package loads neither FastAPI nor vLLM.
"""
