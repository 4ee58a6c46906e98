"""Prints new posts; resumes where it stopped. pip install websockets cbor2"""
import io, pathlib, random, sys, time
import cbor2
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

RELAY = sys.argv[1] if len(sys.argv) > 1 else "wss://relay.example.com"
CURSOR = pathlib.Path("cursor.txt")  # seq of the last event that was handled

def varint(stream):
    value = shift = 0
    while byte := stream.read(1):
        value, shift = value | (byte[0] & 0x7F) << shift, shift + 7
        if byte[0] < 0x80:
            return value

def car_blocks(car):  # CID (36 bytes) -> block
    stream = io.BytesIO(car)
    stream.seek(varint(stream), io.SEEK_CUR)
    while length := varint(stream):
        yield stream.read(36), stream.read(length - 36)

def handle(kind, event):
    if kind != "#commit":
        return
    blocks = dict(car_blocks(event["blocks"]))
    for op in event["ops"]:
        if op["action"] == "create" and op["path"].startswith("app.bsky.feed.post/"):
            post = cbor2.loads(blocks[op["cid"].value[1:]])  # the CID behind its 0 byte
            print(event["seq"], event["repo"], repr(post["text"]), flush=True)

def read(last):
    query = f"?cursor={last}" if last else ""
    url = f"{RELAY}/xrpc/com.atproto.sync.subscribeRepos{query}"
    with connect(url, max_size=5_000_000) as socket:
        for message in socket:
            frame = cbor2.CBORDecoder(io.BytesIO(message))
            header, event = frame.decode(), frame.decode()
            if header["op"] == -1 or header.get("t") == "#info":
                print(event, file=sys.stderr)  # FutureCursor, OutdatedCursor, ConsumerTooSlow
            elif event.get("seq", 0) > last:  # the first event is the one of the cursor
                handle(header["t"], event)
                last = event["seq"]
                CURSOR.write_text(str(last))

while True:
    try:
        read(int(CURSOR.read_text()) if CURSOR.exists() else 0)
    except (OSError, WebSocketException) as error:
        print(f"connection lost: {error}", file=sys.stderr)
    time.sleep(random.uniform(1, 10))
