"""One prompt across this process and a worker; start `splitwise worker --listen 127.0.0.1:7070` first."""

import asyncio
import sys

from splitwise_llm.engine.edge import edge_with


async def main(address: str) -> None:
    with edge_with("bundled", {"cloud": address}) as edge:
        partition = "edge[0:2] cloud[2:6] edge[6:8]"
        async with edge.generate("It was a bright morning, and", partition, max_new_tokens=32) as generation:
            async for token in generation:
                print(token.text, end="", flush=True)
        record = generation.record
    print(f"\n{1e3 * record.tpot_s:.1f} ms/token, {record.up_bytes} bytes up, {record.down_bytes} down")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:7070"))
