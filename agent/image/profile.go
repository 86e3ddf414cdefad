package image

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// maxProfile bounds an encoded profile that comes with an index, bytes.
const maxProfile = 1 << 20

// startKey names the profile and the warm file of an image. Both speak of offsets in inflated layers.
func startKey(img origin.Image, views []*view) string {
	s := "start 1 " + string(img.Digest)
	for _, v := range views {
		s += " " + v.form()
	}
	return store.Key(s)
}

// loadProfile gives the mount what is known of the image's start, and says what that is.
func (im *Image) loadProfile() string {
	b := im.keptProfile()
	if len(b) == 0 {
		return "guess"
	}
	p, err := lazyfs.DecodeProfile(b)
	if err != nil {
		im.o.Log.Warn("a start-up profile is not used", "cause", err)
		return "guess"
	}
	im.config.Profile = p
	if im.openWarm() {
		return "warm"
	}
	return "profile"
}

// openWarm gives the mount the kept warm file. One that is damaged, or of other layers (a derived blob that was made
// again), would keep the server from starting: it is deleted, and made again by this mount.
func (im *Image) openWarm() bool {
	w, err := im.o.Store.Get(store.KindWarm, im.startKey)
	if err != nil {
		return false
	}
	c := im.config
	c.Warm = w
	if _, err = lazyfs.New(c); err == nil {
		im.config.Warm = w
		return true
	}
	_ = w.Close()
	im.o.Log.Warn("a warm file is not used", "cause", err)
	if err := im.o.Store.Delete(store.KindWarm, im.startKey); err != nil {
		im.o.Log.Debug("an unusable warm file stays", "cause", err)
	}
	return false
}

// keptProfile is the encoded profile of the image, or nothing.
func (im *Image) keptProfile() []byte {
	f, err := im.o.Store.Get(store.KindProfile, im.startKey)
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxProfile+1))
	if err != nil || len(b) > maxProfile {
		return nil
	}
	return b
}

// fetchProfile keeps the profile that came with an index, unless there is one from here.
func (o *opener) fetchProfile(ctx context.Context, ix *foundIndex, key string) {
	if ix == nil || ix.profile == nil {
		return
	}
	if f, err := o.Store.Get(store.KindProfile, key); err == nil {
		f.Close()
		return
	}
	b, err := origin.ReadBlob(ctx, o.Repo, *ix.profile, maxProfile)
	o.documents += int64(len(b))
	if err == nil {
		_, err = lazyfs.DecodeProfile(b)
	}
	if err == nil {
		err = o.Store.PutBytes(store.KindProfile, key, b)
	}
	if err != nil {
		o.Log.Info("the index's start-up profile is not used", "cause", err)
	}
}

// keepProfile merges what a mount recorded into the kept profile.
func (im *Image) keepProfile(p lazyfs.Profile) {
	if old, err := lazyfs.DecodeProfile(im.keptProfile()); err == nil {
		before := old.Bytes()
		p = old.Merge(p)
		// A few pages more or less are chance, and not worth a new warm file.
		if p.Bytes() <= before+before/20 {
			return
		}
		// The warm file lacks what is new. The next mount makes it again.
		if err := im.o.Store.Delete(store.KindWarm, im.startKey); err != nil && !errors.Is(err, fs.ErrNotExist) {
			im.o.Log.Debug("an outdated warm file stays", "cause", err)
		}
	}
	if err := im.o.Store.PutBytes(store.KindProfile, im.startKey, p.Encode()); err != nil {
		im.o.notKept("the start-up profile is not kept", err)
	}
}

// A Server is what the image asks of the lazyfs.Server that serves it.
type Server interface {
	ReadFile(ctx context.Context, row tree.Row, p []byte, off int64) (int, error)
	Ahead(ctx context.Context, p lazyfs.Profile)
}

// Guess has s fetch ahead what the command will probably touch first, when nothing better is known. It returns
// when the guess is made, long before everything has arrived; run it beside the mount.
func (im *Image) Guess(ctx context.Context, s Server) {
	if im.start != "guess" {
		return
	}
	args := im.o.Command
	if len(args) == 0 {
		args = append(append(args, im.Resolved.ConfigFile.Entrypoint...), im.Resolved.ConfigFile.Cmd...)
	}
	im.guesser(ctx, s).guess(ctx, args)
}

func (im *Image) guesser(ctx context.Context, s Server) *guesser {
	return &guesser{
		table:   im.table,
		env:     im.Resolved.ConfigFile.Env,
		workdir: im.Resolved.ConfigFile.WorkingDir,
		seen:    map[tree.Row]bool{},
		open: func(ctx context.Context, row tree.Row) io.ReaderAt {
			return readerAt(func(p []byte, off int64) (int, error) { return s.ReadFile(ctx, row, p, off) })
		},
		found: func(row tree.Row, parts []ztoc.Range) {
			if parts == nil {
				parts = []ztoc.Range{{End: guessFile}}
			}
			s.Ahead(ctx, im.fileProfile(row, parts))
		},
	}
}

// fileProfile is parts of a file as a profile, guessFile bytes at most.
func (im *Image) fileProfile(row tree.Row, parts []ztoc.Range) (p lazyfs.Profile) {
	left := int64(guessFile)
	for _, part := range parts {
		end := min(part.End, im.table.Size(row))
		for off := max(part.Start, 0); off < end && left > 0; {
			e := im.table.Extent(row, off)
			if e.Len <= 0 {
				break
			}
			n := min(e.Len, end-off, left)
			if e.Layer >= 0 {
				p.Ranges = append(p.Ranges, lazyfs.ProfileRange{Layer: e.Layer, Start: e.Offset, End: e.Offset + n})
			}
			off += n
			left -= n
		}
	}
	return p
}

type readerAt func(p []byte, off int64) (int, error)

func (f readerAt) ReadAt(p []byte, off int64) (int, error) { return f(p, off) }

// notKept tells that something did not get into the store. Of a full one the store has warned already, once.
func (o *opener) notKept(what string, err error, more ...any) {
	level := slog.LevelWarn
	if errors.Is(err, store.ErrNoSpace) {
		level = slog.LevelDebug
	}
	o.Log.Log(context.Background(), level, what, append(more, "cause", err)...)
}
