// Prints new posts; resumes where it stopped.
// go get github.com/gorilla/websocket github.com/fxamacker/cbor/v2
package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/gorilla/websocket"
)

const cursorFile = "cursor.txt" // seq of the last event that was handled

type header struct {
	Op   int    `cbor:"op"`
	Kind string `cbor:"t"`
}

type event struct {
	Seq    uint64 `cbor:"seq"`
	Repo   string `cbor:"repo"`
	Blocks []byte `cbor:"blocks"`
	Ops    []struct {
		Action string    `cbor:"action"`
		Path   string    `cbor:"path"`
		CID    *cbor.Tag `cbor:"cid"`
	} `cbor:"ops"`
	Error, Name, Message string
}

func carBlocks(car []byte) map[string][]byte {
	blocks := map[string][]byte{}
	length, size := binary.Uvarint(car)
	for car = car[size+int(length):]; len(car) > 0; car = car[size+int(length):] {
		length, size = binary.Uvarint(car)
		block := car[size : size+int(length)]
		blocks[string(block[:36])] = block[36:]
	}
	return blocks
}

func handle(kind string, event event) {
	if kind != "#commit" {
		return
	}
	blocks := carBlocks(event.Blocks)
	for _, op := range event.Ops {
		if op.Action == "create" && strings.HasPrefix(op.Path, "app.bsky.feed.post/") {
			var post struct {
				Text string `cbor:"text"`
			}
			cid := op.CID.Content.([]byte)[1:] // behind its 0 byte
			if cbor.Unmarshal(blocks[string(cid)], &post) == nil {
				fmt.Printf("%d %s %q\n", event.Seq, event.Repo, post.Text)
			}
		}
	}
}

func read(relay string) error {
	var last uint64
	url := relay + "/xrpc/com.atproto.sync.subscribeRepos"
	if text, err := os.ReadFile(cursorFile); err == nil {
		fmt.Sscan(string(text), &last)
		url += fmt.Sprint("?cursor=", last)
	}
	socket, _, err := websocket.DefaultDialer.Dial(url, nil)
	if err != nil {
		return err
	}
	defer socket.Close()
	socket.SetReadLimit(5_000_000)
	for {
		_, message, err := socket.ReadMessage()
		if err != nil {
			return err
		}
		var header header
		var event event
		rest, err := cbor.UnmarshalFirst(message, &header)
		if err == nil {
			err = cbor.Unmarshal(rest, &event)
		}
		if err != nil {
			return err
		}
		if header.Op == -1 || header.Kind == "#info" { // FutureCursor, OutdatedCursor, ConsumerTooSlow
			fmt.Fprintln(os.Stderr, event.Error, event.Name, event.Message)
		} else if event.Seq > last { // the first event is the one of the cursor
			handle(header.Kind, event)
			last = event.Seq
			os.WriteFile(cursorFile, fmt.Append(nil, last), 0o644)
		}
	}
}

func main() {
	relay := "wss://relay.example.com"
	if len(os.Args) > 1 {
		relay = os.Args[1]
	}
	for {
		fmt.Fprintln(os.Stderr, "connection lost:", read(relay))
		time.Sleep(time.Second + rand.N(9*time.Second))
	}
}
