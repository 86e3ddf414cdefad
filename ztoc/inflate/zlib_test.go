package inflate

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"testing/iotest"
)

// TestZlib compares with zlib on streams that testdata/streams.py makes: stored, fixed and dynamic
// blocks of all levels and strategies, with flushes, at all distances, and most of them mutated.
// MUSTER_STREAMS says how many; make fuzz asks for a million.
func TestZlib(t *testing.T) {
	count := "6000"
	if s := os.Getenv("MUSTER_STREAMS"); s != "" {
		count = s
	}
	n, err := strconv.Atoi(count)
	if err != nil {
		t.Fatal(err)
	}
	const at, shares = 1000, 2
	if n < at {
		t.Fatalf("MUSTER_STREAMS=%s: at least %d", count, at)
	}
	for seed := range shares {
		t.Run(strconv.Itoa(seed), func(t *testing.T) {
			t.Parallel()
			compareZlib(t, n/shares, seed)
		})
	}
}

func compareZlib(t *testing.T, count, seed int) {
	cmd := exec.Command("python3", "testdata/streams.py", strconv.Itoa(count), strconv.Itoa(seed))
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v (Debian's python3 package)", err)
	}
	defer func() {
		if t.Failed() {
			cmd.Process.Kill()
		}
		if err := cmd.Wait(); err != nil && !t.Failed() {
			t.Errorf("streams.py: %v", err)
		}
	}()
	r := bufio.NewReaderSize(pipe, 1<<20)
	z := new(Reader)
	verdicts := make(map[byte]int)
	for i := range count {
		var h [14]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			t.Fatal(err)
		}
		used := binary.LittleEndian.Uint32(h[2:])
		b := make([]byte, binary.LittleEndian.Uint32(h[6:]))
		want := make([]byte, binary.LittleEndian.Uint32(h[10:]))
		for _, p := range [][]byte{b, want} {
			if _, err := io.ReadFull(r, p); err != nil {
				t.Fatal(err)
			}
		}
		kind, verdict := h[0], h[1]
		verdicts[verdict]++
		if kind == 'D' { // becomes a member, which shows whether the end was found where zlib did
			head := []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}
			if verdict == 'K' {
				b = b[:used]
			}
			b = append(head, b...)
			if verdict == 'K' {
				b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(want))
				b = binary.LittleEndian.AppendUint32(b, uint32(len(want)))
			}
		} else {
			b = b[:used]
		}
		if agree(t, z, b, want, verdict, i%8 == 0); t.Failed() {
			t.Fatalf("stream %d of seed %d, %c%c: %x", i, seed, kind, verdict, b)
		}
	}
	for _, v := range []byte("KTE") {
		if verdicts[v] < count/20 {
			t.Errorf("%d of %d streams have verdict %c: not much of a test", verdicts[v], count, v)
		}
	}
}

// agree checks that b inflated by z in several ways comes to what zlib found.
func agree(t *testing.T, z *Reader, b, want []byte, verdict byte, spans bool) {
	t.Helper()
	var points []restart
	for _, how := range []struct {
		name string
		r    io.Reader
	}{
		{"at once", bytes.NewReader(b)},                        // by the fast loop
		{"by bytes", iotest.OneByteReader(bytes.NewReader(b))}, // by the careful loop
	} {
		points = nil
		z.Reset(how.r, Options{
			Interval: 1,
			OnCheckpoint: func(c Checkpoint, window []byte) error {
				if spans {
					points = append(points, restart{c, bytes.Clone(window)})
				}
				return nil
			},
		})
		got, err := io.ReadAll(z)
		var e *Error
		var c Cause
		switch {
		case err != nil && !errors.As(err, &e):
			t.Errorf("%s: error of another type: %v", how.name, err)
		case verdict == 'K' && err != nil,
			verdict == 'T' && !errors.Is(err, Truncated),
			verdict == 'E' && (!errors.As(err, &c) || c == Truncated):
			t.Errorf("%s: %v", how.name, err)
		case e != nil && (e.Offset < 0 || e.Offset > int64(len(b))):
			t.Errorf("%s: error at %d of %d", how.name, e.Offset, len(b))
		case verdict != 'E' && !bytes.Equal(got, want):
			t.Errorf("%s: %d bytes for %d", how.name, len(got), len(want))
		}
	}
	if spans && !t.Failed() {
		got, points, err := readAll(b, 500)
		checkCrew(t, b, got, err, points)
	}
	if spans && verdict == 'K' && !t.Failed() {
		checkSpans(t, b, want, points)
	}
}
