// Gate runs go test and answers for what the tests leave behind.
//
//	go run ./tests/gate [-race] [-timeout D] PACKAGES…
//
// The algorithm:
//
//  1. Make an empty directory and give it to the tests as TMPDIR.
//  2. Run go test -json, of packages with whole clusters after the others and one at a time; print the output of tests that fail and one line for each package.
//  3. Look for what is left: a mount beneath the directory or of muster's, a process that carries the
//     directory in its environment, a file in the directory, or one called muster… in /tmp, /var/tmp,
//     /dev/shm or /run that was not there before. Each is a failure, named with what it takes to find
//     the test that left it. Then clean up.
//  4. Print "N passed, N failed" as the last line.
//
// A process that clears its environment and is not in the directory's mounts is not found; every
// process that muster starts on its own behalf keeps TMPDIR.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	race := flag.Bool("race", false, "build the tests with the race detector")
	timeout := flag.Duration("timeout", 15*time.Minute, "longest time for the tests of one package")
	run := flag.String("run", "", "only tests that match this expression")
	flag.Parse()
	args := []string{"test", "-json", "-timeout", timeout.String()}
	if *race {
		args = append(args, "-race")
	}
	if *run != "" {
		args = append(args, "-run", *run)
	}
	beside, alone, err := packages(flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "gate:", err)
		os.Exit(1)
	}
	var runs [][]string
	if len(beside) > 0 {
		runs = append(runs, append(slices.Clone(args), beside...))
	}
	if len(alone) > 0 {
		runs = append(runs, append(append(slices.Clone(args), "-p", "1"), alone...))
	}
	os.Exit(gate(runs...))
}

// packages is what patterns name: what may be tested at once, and what has to be alone. Real processes in namespaces of
// their own take all cores, and hold a copy of every mount that another test makes meanwhile.
func packages(patterns []string) (beside, alone []string, err error) {
	out, err := exec.Command("go", append([]string{"list"}, patterns...)...).Output()
	for _, p := range strings.Fields(string(out)) {
		if strings.Contains(p, "/tests/e2e") || strings.Contains(p, "/tests/cluster") {
			alone = append(alone, p)
		} else {
			beside = append(beside, p)
		}
	}
	return beside, alone, err
}

// gate runs go test with each of runs, one after the other, and says how it went.
func gate(runs ...[]string) int {
	dir, err := os.MkdirTemp("", "muster-gate-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "gate:", err)
		return 1
	}
	// Tests that give up their privileges must reach files that they make in here.
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, "gate:", err)
		return 1
	}
	before, files := musterMounts(dir), elsewhere()

	var count tally
	for _, args := range runs {
		c, err := goTest(dir, args)
		count.passed, count.failed = count.passed+c.passed, count.failed+c.failed
		if err != nil && c.failed == 0 {
			// The run itself broke: a package that does not build, a crash outside any test.
			fmt.Println("FAIL go test:", err)
			count.failed++
		}
	}
	for _, l := range leftovers(dir, before, files) {
		fmt.Println("FAIL left behind:", l)
		count.failed++
	}
	if err := os.RemoveAll(dir); err != nil {
		fmt.Println("FAIL left behind:", err)
		count.failed++
	}
	fmt.Printf("%d passed, %d failed\n", count.passed, count.failed)
	if count.failed > 0 || count.passed == 0 {
		return 1
	}
	return 0
}

// goTest runs go with args, and with dir for temporary files.
func goTest(dir string, args []string) (tally, error) {
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+dir, within+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return tally{}, err
	}
	if err := cmd.Start(); err != nil {
		return tally{}, err
	}
	count := follow(out, os.Stdout)
	return count, cmd.Wait()
}

// An event is one line of go test -json, as `go doc test2json` has it.
type event struct {
	Action     string
	Package    string
	ImportPath string // of build events
	Test       string
	Output     string
	Elapsed    float64
}

type tally struct{ passed, failed int }

// follow prints the stream for people and counts tests; subtests count as tests.
func follow(r io.Reader, w io.Writer) (n tally) {
	type key struct{ pkg, test string }
	output := map[key]*bytes.Buffer{}
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 64<<10), 16<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil {
			fmt.Fprintln(w, sc.Text())
			continue
		}
		k := key{e.Package, e.Test}
		switch e.Action {
		case "output":
			b := output[k]
			if b == nil {
				b = new(bytes.Buffer)
				output[k] = b
			}
			b.WriteString(e.Output)
		case "build-output":
			fmt.Fprint(w, e.Output)
		case "pass", "skip":
			if e.Test != "" {
				if e.Action == "pass" {
					n.passed++
				} else {
					fmt.Fprintf(w, "skip %s %s\n", e.Package, e.Test)
				}
			} else if e.Action == "pass" {
				fmt.Fprintf(w, "ok   %-60s %6.1fs\n", e.Package, e.Elapsed)
			}
			delete(output, k)
		case "fail":
			if e.Test != "" {
				n.failed++
				fmt.Fprintf(w, "FAIL %s %s\n", e.Package, e.Test)
			} else {
				fmt.Fprintf(w, "FAIL %-60s %6.1fs\n", e.Package, e.Elapsed)
			}
			if b := output[k]; b != nil {
				_, _ = w.Write(b.Bytes())
				delete(output, k)
			}
		}
	}
	return n
}

// leftovers waits up to five seconds for what is on its way out, then names what stayed.
func leftovers(dir string, before, filesBefore map[string]bool) []string {
	var left []string
	for wait := 0; wait < 50; wait++ {
		left = left[:0]
		for m := range musterMounts(dir) {
			if !before[m] {
				left = append(left, "mount "+m)
			}
		}
		left = append(left, processes(dir)...)
		left = append(left, files(dir)...)
		for f := range elsewhere() {
			if !filesBefore[f] && f != dir {
				left = append(left, "file "+f)
			}
		}
		if len(left) == 0 {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	// Cleaned up, so that the next run starts clean; said all the same.
	for m := range musterMounts(dir) {
		// What is elsewhere may be somebody's who works beside this run.
		if !before[m] && strings.HasPrefix(m, dir+"/") {
			_ = syscall.Unmount(m, syscall.MNT_DETACH)
		}
	}
	return left
}

// within is set in the environment of the tests: a gate that one of them runs looks beneath its own directory only,
// because the tests beside it mount and unmount all the time.
const within = "MUSTER_GATE"

func nested() bool { return os.Getenv(within) != "" }

// musterMounts is the set of mount points beneath dir, of whatever kind, and of muster's everywhere.
func musterMounts(dir string) map[string]bool {
	mounts := map[string]bool{}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return mounts
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		at, err := strconv.Unquote(`"` + strings.ReplaceAll(f[4], `"`, `\"`) + `"`)
		if err != nil {
			at = f[4]
		}
		ours := strings.Contains(line, " - fuse.muster ") || strings.Contains(line, " muster-r")
		if strings.HasPrefix(at, dir+"/") || ours && !nested() {
			mounts[at] = true
		}
	}
	return mounts
}

// elsewhere is what tests that cannot use TMPDIR (it may be on tmpfs, or hidden from a container) leave:
// everything called muster… in the usual places.
func elsewhere() map[string]bool {
	found := map[string]bool{}
	if nested() {
		return found
	}
	for _, pattern := range []string{"/tmp/muster*", "/var/tmp/muster*", "/dev/shm/muster*", "/run/muster*"} {
		names, _ := filepath.Glob(pattern)
		for _, n := range names {
			found[n] = true
		}
	}
	return found
}

// processes names every process, other than this one, that has dir in its environment.
func processes(dir string) (left []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, p := range all {
		pid := filepath.Base(filepath.Dir(p))
		if pid == strconv.Itoa(os.Getpid()) {
			continue
		}
		b, err := os.ReadFile(p)
		if err != nil || !bytes.Contains(b, []byte(dir)) {
			continue
		}
		cmd, _ := os.ReadFile("/proc/" + pid + "/cmdline")
		left = append(left, fmt.Sprintf("process %s: %s", pid, strings.TrimSpace(string(bytes.ReplaceAll(cmd, []byte{0}, []byte{' '})))))
	}
	return left
}

// files names what lies directly in dir.
func files(dir string) (left []string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return []string{err.Error()}
	}
	for _, e := range entries {
		kind := "file "
		if e.Type()&fs.ModeDir != 0 {
			kind = "directory "
		}
		left = append(left, kind+filepath.Join(dir, e.Name()))
	}
	return left
}
