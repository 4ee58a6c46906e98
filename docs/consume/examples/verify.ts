// Prints new posts whose signature and proof were checked here. npm install @atproto/sync @atproto/identity
import { IdResolver } from '@atproto/identity'
import { Firehose, MemoryRunner } from '@atproto/sync'

const [service = 'wss://relay.example.com', plcUrl = 'https://plc.directory'] = process.argv.slice(2)
const runner = new MemoryRunner({ startCursor: 0, setCursor: async (seq) => { /* store seq here */ } })
const firehose = new Firehose({
  service,
  runner,
  idResolver: new IdResolver({ plcUrl }),
  filterCollections: ['app.bsky.feed.post'],
  handleEvent: async (event) => {
    if (event.event === 'create') console.log(event.seq, event.did, JSON.stringify(event.record.text))
  },
  onError: (error) => console.error(error.message, error.cause),
})
firehose.start()
