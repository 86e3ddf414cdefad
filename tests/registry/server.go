package registry

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Rates in bytes per second.
const (
	Mbit int64 = 1_000_000 / 8
	Gbit int64 = 1000 * Mbit
)

// A Server is a registry that listens on a loopback port.
type Server struct {
	Addr string // "127.0.0.1:port": put "/name:tag" behind it to have a reference

	http *http.Server
	cmd  *exec.Cmd
	done chan error // closed when cmd has ended
}

// Options are what an embedded registry is started with.
type Options struct {
	// Referrers serves the referrers API. Without it clients use the fallback tag, as with Debian's.
	Referrers bool
	// Addr is where to listen; "" is a free port of 127.0.0.1.
	Addr string
}

// Start runs an embedded registry that keeps everything in dir. What dir has from an earlier run is there
// again.
func Start(dir string, o Options) (*Server, error) {
	h, err := NewHandler(dir, o)
	if err != nil {
		return nil, err
	}
	l, err := listen(o.Addr)
	if err != nil {
		return nil, err
	}
	s := &Server{Addr: l.Addr().String(), http: newHTTP(h)}
	go s.http.Serve(l) // ends with Close
	return s, nil
}

func listen(addr string) (net.Listener, error) {
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	return net.Listen("tcp", addr)
}

func newHTTP(h http.Handler) *http.Server {
	// Broken connections are what these tests are about: they are no news.
	return &http.Server{Handler: h, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(discard{}, "", 0)}
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// debianRegistry is where Debian's package docker-registry puts the server.
const debianRegistry = "/usr/bin/docker-registry"

// StartDebian runs Debian's docker-registry on a loopback port with its storage in dir.
func StartDebian(dir string) (*Server, error) {
	if _, err := os.Stat(debianRegistry); err != nil {
		return nil, fmt.Errorf("%w: apt-get install docker-registry", err)
	}
	l, err := listen("")
	if err != nil {
		return nil, err
	}
	addr := l.Addr().String()
	l.Close()
	config := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf("version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: %s\n  delete:\n    enabled: true\nhttp:\n  addr: %s\n  secret: test\n", filepath.Join(dir, "storage"), addr)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	out, err := os.Create(filepath.Join(dir, "registry.log"))
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd := exec.Command(debianRegistry, "serve", config)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &Server{Addr: addr, cmd: cmd, done: make(chan error)}
	go func() {
		cmd.Wait()
		close(s.done)
	}()
	for deadline := time.Now().Add(20 * time.Second); ; {
		resp, err := http.Get("http://" + addr + "/v2/")
		if err == nil {
			resp.Body.Close()
			return s, nil
		}
		select {
		case <-s.done:
			b, _ := os.ReadFile(out.Name())
			return nil, fmt.Errorf("docker-registry ended at once: %s", strings.TrimSpace(string(b)))
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.Close()
			return nil, errors.New("docker-registry does not answer")
		}
	}
}

// Handler forwards to the server: to put a [Proxy] in front of it.
func (s *Server) Handler() http.Handler { return Upstream(s.Addr) }

// Close stops the server and its connections.
func (s *Server) Close() error {
	if s.http != nil {
		return s.http.Close()
	}
	s.cmd.Process.Signal(syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	select {
	case <-s.done:
	case <-ctx.Done():
		s.cmd.Process.Kill()
		<-s.done
	}
	return nil
}
