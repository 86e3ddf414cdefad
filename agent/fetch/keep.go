package fetch

import (
	"sync"
	"time"
)

// A keeper is a blob's place in the store, once it could be opened.
type keeper struct {
	mu sync.RWMutex
	b  Blob
}

func (k *keeper) get() Blob {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.b
}

func (k *keeper) close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.b == nil {
		return nil
	}
	b := k.b
	k.b = nil
	return b.Close()
}

// reopenEvery is how often a store that refused a blob is asked again.
const reopenEvery = 5 * time.Second

// openSoon has openStore done without waiting for it.
func (c *Chain) openSoon(b *blob) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.o.Store == nil || !b.soon.CompareAndSwap(false, true) {
		return
	}
	c.wg.Go(func() {
		c.openStore(b)
		b.soon.Store(false)
	})
}

// openStore opens the blob in the store, if there is one and it will.
func (c *Chain) openStore(b *blob) {
	if c.o.Store == nil {
		return
	}
	b.opening.Lock()
	defer b.opening.Unlock()
	if b.kept.get() != nil || time.Since(b.tried) < reopenEvery {
		return
	}
	b.tried = time.Now()
	st, err := c.o.Store.Blob(b.ref)
	if err != nil {
		return // the store has said so itself
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		st.Close()
		return
	}
	b.kept.mu.Lock()
	b.kept.b = st
	b.kept.mu.Unlock()
}
