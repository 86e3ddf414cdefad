package peer

import (
	"bufio"
	"net"
	"sync"
)

// A batchConn lies between TLS and TCP. TLS writes each record of 16 KiB by itself and reads about as much at a time; a
// system call each, and a wake-up of the other end. A batchConn writes a whole frame at once and reads what is there.
type batchConn struct {
	net.Conn
	in *bufio.Reader // nil: not batched

	mu   sync.Mutex
	held *[]byte // records of a frame that is being written; nil: written through
}

const batchSize = FrameSize + headerSize + 16<<10 // a frame and the records' own bytes

var batches = sync.Pool{New: func() any { b := make([]byte, 0, batchSize); return &b }}

func (c *batchConn) Read(p []byte) (int, error) {
	if c.in == nil {
		return c.Conn.Read(p)
	}
	return c.in.Read(p)
}

func (c *batchConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held == nil {
		return c.Conn.Write(p)
	}
	if len(*c.held)+len(p) > cap(*c.held) {
		if err := c.flush(); err != nil {
			return 0, err
		}
	}
	*c.held = append(*c.held, p...)
	return len(p), nil
}

func (c *batchConn) flush() error {
	_, err := c.Conn.Write(*c.held)
	*c.held = (*c.held)[:0]
	return err
}

// whole has write, which writes one frame through TLS, end in one system call.
func (c *batchConn) whole(write func() error) error {
	c.mu.Lock()
	c.held = batches.Get().(*[]byte)
	c.mu.Unlock()
	err := write()
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && len(*c.held) > 0 {
		err = c.flush()
	}
	*c.held = (*c.held)[:0]
	batches.Put(c.held)
	c.held = nil
	return err
}
