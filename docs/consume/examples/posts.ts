// Prints new posts; resumes where it stopped. npm install ws cborg
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { decode, decodeFirst, Tagged } from 'cborg'
import WebSocket from 'ws'

const relay = process.argv[2] ?? 'wss://relay.example.com'
const file = 'cursor.txt' // seq of the last event that was handled
const tags = Tagged.preserve(42) // CIDs
const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex')

function carBlocks(car: Uint8Array): Map<string, Uint8Array> {
  let at = 0
  const varint = () => {
    for (let value = 0, factor = 1; ; factor *= 128) {
      const byte = car[at++]
      value += (byte & 0x7f) * factor
      if (byte < 0x80) return value
    }
  }
  const blocks = new Map<string, Uint8Array>()
  at = varint() + at // behind the header
  while (at < car.length) {
    const end = varint() + at
    blocks.set(hex(car.subarray(at, at + 36)), car.subarray(at + 36, end))
    at = end
  }
  return blocks
}

function handle(kind: string, event: any) {
  if (kind !== '#commit') return
  const blocks = carBlocks(event.blocks)
  for (const op of event.ops) {
    if (op.action !== 'create' || !op.path.startsWith('app.bsky.feed.post/')) continue
    const post = decode(blocks.get(hex(op.cid.value.subarray(1)))!, { tags }) // the CID behind its 0 byte
    console.log(event.seq, event.repo, JSON.stringify(post.text))
  }
}

function read() {
  let last = existsSync(file) ? Number(readFileSync(file, 'utf8')) : 0
  const query = last ? `?cursor=${last}` : ''
  const socket = new WebSocket(`${relay}/xrpc/com.atproto.sync.subscribeRepos${query}`, { maxPayload: 5_000_000 })
  socket.on('message', (message: Buffer) => {
    const [header, rest] = decodeFirst(message, { tags })
    const event = decode(rest, { tags })
    if (header.op === -1 || header.t === '#info') return console.error(event) // FutureCursor, OutdatedCursor, …
    if (!(event.seq > last)) return // the first event is the one of the cursor
    handle(header.t, event)
    last = event.seq
    writeFileSync(file, String(last))
  })
  socket.on('error', (error) => console.error('connection lost:', error.message))
  socket.on('close', () => setTimeout(read, 1000 + Math.random() * 9000))
}

read()
