package store

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/ztoc"
)

// The torture test runs four processes over one store at half the size of what they want from it, kills
// them at random, and, in its second half, zeroes blocks under present ranges. Each reader does what lazyfs
// does: it reads a span, hashes it, and on a mismatch drops it and writes it again.

const (
	tortureEnv   = "MUSTER_STORE_TORTURE" // directory of the store, for a process of the torture test
	tortureQuota = 16 << 20
	tortureSpan  = 192<<10 + 1000 // does not fall on blocks
)

// tortureBlobs is what the processes want: twice the quota.
var tortureBlobs = sync.OnceValue(func() [][]byte {
	var out [][]byte
	total := 0
	for i := 0; total < 2*tortureQuota; i++ {
		b := content(uint64(100+i), []int{300 << 10, 1 << 20, 5<<20 + 123, 13 << 20}[i%4])
		out = append(out, b)
		total += len(b)
	}
	return out
})

// tortureRefs are their references, hashed when first needed.
var tortureRefs = func() (out [64]func() ztoc.BlobRef) {
	for i := range out {
		out[i] = sync.OnceValue(func() ztoc.BlobRef { return refOf(tortureBlobs()[i]) })
	}
	return out
}()

func TestMain(m *testing.M) {
	if dir := os.Getenv(tortureEnv); dir != "" {
		if err := tortureProcess(dir); err != nil {
			fmt.Println("FAIL", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// tortureProcess works until it is killed or its standard input ends. It prints a line for each thing worth
// counting.
func tortureProcess(dir string) error {
	for i := range tortureBlobs() {
		tortureRefs[i]()
	}
	fmt.Println("ready") // from here on it may be killed
	s, err := Open(dir, Options{Quota: tortureQuota})
	if err != nil {
		return err
	}
	defer s.Close()
	var end sync.WaitGroup
	stop := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin) //nolint:errcheck // its end is all that counts
		close(stop)
	}()
	errs := make(chan error, 3)
	for g := range 3 {
		end.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(os.Getpid()), uint64(g)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := tortureStep(s, rnd); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	end.Wait()
	close(errs)
	return <-errs
}

// tortureStep opens a blob and reads some of its spans.
func tortureStep(s *Store, rnd *rand.Rand) error {
	which := rnd.IntN(len(tortureBlobs()))
	data := tortureBlobs()[which]
	ref := tortureRefs[which]()
	b, err := s.Blob(ref)
	if errors.Is(err, ErrNoSpace) {
		fmt.Println("full")
		return nil
	}
	if err != nil {
		return err
	}
	defer b.Close()
	p := make([]byte, tortureSpan)
	first := rnd.IntN(len(data)/tortureSpan + 1)
	for i := first; i < first+1+rnd.IntN(30) && i*tortureSpan < len(data); i++ {
		r := ztoc.Range{Start: int64(i * tortureSpan), End: int64(min(len(data), (i+1)*tortureSpan))}
		right := data[r.Start:r.End]
		want := sha256.Sum256(right)
		for try := 0; ; try++ {
			if try > 50 {
				return fmt.Errorf("%v of %d bytes never comes right", r, len(data))
			}
			err := b.ReadAt(p[:r.Len()], r.Start)
			if err == nil {
				if sha256.Sum256(p[:r.Len()]) == want {
					fmt.Println("read")
					break
				}
				fmt.Println("mismatch")
				b.Drop(r)
				continue
			}
			if !errors.Is(err, ErrAbsent) {
				return err
			}
			// As the chain does: fetch what is missing, keep it, and use it whether it was kept or not.
			for _, m := range b.Missing(r) {
				if err := b.WriteAt(data[m.Start:m.End], m.Start); err != nil && !errors.Is(err, ErrNoSpace) {
					return err
				}
			}
			fmt.Println("fetch")
			if rnd.IntN(4) == 0 {
				break
			}
		}
	}
	switch rnd.IntN(40) {
	case 0:
		err = s.Put(KindZtoc, Key(strconv.Itoa(rnd.IntN(5))), func(w io.Writer) error {
			_, err := w.Write(data[:min(len(data), 100<<10)])
			return err
		})
	case 1:
		_, err = s.GC(GCOptions{})
	case 2:
		_, err = s.List()
	case 3:
		err = s.PutImage(Image{Key: Key("image"), Blobs: []ztoc.BlobRef{ref}})
	case 4:
		_, err = s.Remove(Key("image"))
	}
	if errors.Is(err, ErrNoSpace) || errors.Is(err, os.ErrNotExist) || errors.Is(err, errBusy) {
		err = nil
	}
	return err
}

func TestTorture(t *testing.T) {
	phase := 4 * time.Second
	if v := os.Getenv("MUSTER_TEST_LONG"); v != "" {
		phase = 60 * time.Second
	}
	dir := t.TempDir() + "/s"
	s := openStore(t, dir, Options{Quota: tortureQuota})
	pinned := content(99, 2<<20)
	if err := s.Pin(Key("pinned"), []ztoc.Digest{refOf(pinned).Digest}); err != nil {
		t.Fatal(err)
	}
	pb, err := s.Blob(refOf(pinned))
	if err != nil {
		t.Fatal(err)
	}
	if err := pb.WriteAt(pinned, 0); err != nil {
		t.Fatal(err)
	}
	pb.Close()

	count := map[string]int{}
	run := func(zero bool) {
		end := time.Now().Add(phase)
		var mu sync.Mutex
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(g), 3))
				for time.Now().Before(end) {
					lines := tortureRun(t, dir, min(time.Until(end), 200*time.Millisecond+time.Duration(rnd.IntN(1500))*time.Millisecond))
					mu.Lock()
					for k, n := range lines {
						count[k] += n
					}
					count["killed"]++
					mu.Unlock()
				}
			})
		}
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		rnd := rand.New(rand.NewPCG(1, 1))
		most := int64(0)
		for {
			select {
			case <-done:
				// Four processes with writeSlots chunks in flight, and tables of the file system.
				if limit := int64(tortureQuota + 6<<20); most > limit {
					t.Errorf("the store took %d bytes of a quota of %d", most, tortureQuota)
				}
				t.Logf("zeroing %v: %v, at most %d of %d bytes", zero, count, most, tortureQuota)
				return
			case <-time.After(10 * time.Millisecond):
			}
			most = max(most, s.survey().total)
			if zero {
				tortureZero(t, s, rnd)
			}
		}
	}
	run(false)
	// Kills and evictions alone never leave a lie: what is marked was written, and what is punched was
	// unmarked first.
	if count["mismatch"] > 0 {
		t.Errorf("%d reads gave wrong bytes though nobody damaged any", count["mismatch"])
	}
	if count["read"] == 0 || count["fetch"] == 0 {
		t.Errorf("nothing was tested: %v", count)
	}
	run(true)
	if count["mismatch"] == 0 {
		t.Errorf("zeroed blocks were never noticed: %v", count)
	}

	pb = openBlob(t, s, refOf(pinned))
	if err := pb.Verify(t.Context()); err != nil {
		t.Errorf("the pinned blob: %v", err)
	}
	if _, err := s.GC(GCOptions{}); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(s.path(tmpDir)); len(left) > 0 {
		t.Errorf("%d temporary files of dead processes are left", len(left))
	}
	if used, real := s.used().Load(), s.survey().total; used != real || used > tortureQuota {
		t.Errorf("the counter says %d bytes, the disk %d, the quota is %d", used, real, tortureQuota)
	}
}

// tortureRun runs one process for d, kills it, and counts its lines.
func tortureRun(t *testing.T, dir string, d time.Duration) map[string]int {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), tortureEnv+"="+dir, "GOMAXPROCS=2")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Error(err)
		return nil
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Error(err)
		return nil
	}
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return nil
	}
	lines := map[string]int{}
	sc := bufio.NewScanner(out)
	for sc.Scan() {
		if sc.Text() == "ready" {
			kill := time.AfterFunc(d, func() { cmd.Process.Kill() })
			defer kill.Stop()
		}
		if strings.HasPrefix(sc.Text(), "FAIL") {
			t.Error(sc.Text())
		}
		lines[sc.Text()]++
	}
	cmd.Wait() //nolint:errcheck // it was killed
	return lines
}

// tortureZero zeroes a block of some blob that has data there.
func tortureZero(t *testing.T, s *Store, rnd *rand.Rand) {
	names, err := os.ReadDir(s.path(blobsDir))
	if err != nil || len(names) == 0 {
		return
	}
	ref, ok := parseBlobName(names[rnd.IntN(len(names))].Name())
	if !ok {
		t.Errorf("a foreign file among the blobs")
		return
	}
	if ref.Digest == refOf(content(99, 2<<20)).Digest {
		return
	}
	f, err := os.OpenFile(filepath.Join(s.path(blobsDir), blobName(ref)), os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer f.Close()
	off, err := unix.Seek(int(f.Fd()), rnd.Int64N(ref.Size), unix.SEEK_DATA)
	if err != nil || off >= ref.Size {
		return
	}
	f.WriteAt(bytes.Repeat([]byte{0}, int(min(4096, ref.Size-off))), off)
}
