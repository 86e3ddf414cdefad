package mountd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/muster-hpc/muster/lazyfs"
)

// A Keeper holds the descriptors of mounts, so that one whose processes are all killed at once goes on: it starts a
// parent, which starts a server. It is for a process that lives as long as the host, such as the agent.
//
// It starts the program that the mount had when it was asked, which may be of another version than the keeper's.
//
// Keep asks a mount once. From then on the keeper sleeps until no process of the mount is left; the mount's processes know
// nothing of it. When a keeper starts it should Keep what Mounts lists: so it may be restarted at any time.
type Keeper struct {
	log     *slog.Logger
	program *os.File // log of mounts' processes

	mu   sync.Mutex
	kept map[uint32]*kit // by device minor
	done bool
	wg   sync.WaitGroup
}

// NewKeeper makes a keeper. Processes that it starts write what goes wrong to log; nil: nowhere.
func NewKeeper(log *slog.Logger, mountLog *os.File) *Keeper {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Keeper{log: log, program: mountLog, kept: map[uint32]*kit{}}
}

// Keep takes the mount on dir into its care, until it is gone. Doing so again is harmless.
func (k *Keeper) Keep(ctx context.Context, dir string) error {
	dir, err := resolve(dir)
	if err != nil {
		return err
	}
	m, files, err := request(ctx, dir, message{Kind: kindKeep})
	if err != nil {
		return err
	}
	got, err := unpack(m, files)
	if err != nil {
		return err
	}
	st, err := got.standing()
	if err == nil && got.exe == nil {
		err = errors.New("the mount did not say what its program is")
	}
	if err != nil {
		got.Close()
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.done || k.kept[st.Conn.Minor] != nil {
		got.Close()
		if k.done {
			return errors.New("the keeper is closed")
		}
		return nil
	}
	k.kept[st.Conn.Minor] = got
	k.wg.Go(func() { k.watch(got, st) })
	return nil
}

// Close lets go of all mounts, which go on without a keeper.
func (k *Keeper) Close() {
	k.mu.Lock()
	k.done = true
	for _, got := range k.kept {
		_ = got.alive.Close()
	}
	k.mu.Unlock()
	k.wg.Wait()
}

func (k *Keeper) closing() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.done
}

// watch revives the mount whenever its processes are gone and it is not.
func (k *Keeper) watch(got *kit, st standing) {
	defer func() {
		k.mu.Lock()
		delete(k.kept, st.Conn.Minor)
		k.mu.Unlock()
		got.Close()
	}()
	for {
		_, err := got.alive.Read(make([]byte, 1)) // nothing is written: it returns at the end
		if errors.Is(err, os.ErrClosed) || k.closing() {
			return
		}
		if c, err := lazyfs.Mounted(st.Start.Dir); err != nil || c.Minor != st.Conn.Minor {
			return // it has ended as it should
		}
		if err := k.revive(got, st); err != nil {
			if done := k.closing(); done {
				return
			}
			k.log.Error("ending a mount whose processes died", "dir", st.Start.Dir, "error", err)
			_ = lazyfs.Abort(st.Start.Dir)
			_ = release(st)
			return
		}
	}
}

// revive starts a parent for the mount. Should it fail, it tries again as long as deaths in vain are allowed.
func (k *Keeper) revive(got *kit, st standing) error {
	exe, err := pathOf(got.exe)
	if err != nil {
		return err
	}
	for {
		wait, err := got.mourn(roleServer)
		if err != nil {
			return err
		}
		time.Sleep(wait)
		k.log.Warn("all processes of a mount died, starting others", "dir", st.Start.Dir)
		k.mu.Lock()
		if k.done {
			k.mu.Unlock()
			return errors.New("the keeper is being closed")
		}
		err = got.renew()
		k.mu.Unlock()
		if err != nil {
			return err
		}
		conn, err := replaceParent(exe, st.Start.Dir, k.program, got, message{Kind: kindAdopt}, adoptWait)
		_ = got.life.Close() // theirs alone
		got.life = nil
		if err == nil {
			return conn.Close()
		}
		k.log.Error("revive a mount", "dir", st.Start.Dir, "error", fmt.Errorf("start a parent: %w", err))
	}
}
