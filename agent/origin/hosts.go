package origin

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// hostConfig is one host of a hosts.toml: a mirror, or the registry itself.
type hostConfig struct {
	base       url.URL // scheme, host and path of the API's root, "/v2" included
	pull       bool
	resolve    bool
	push       bool
	skipVerify bool
	ca         []string    // PEM files
	clients    [][2]string // certificate and key files; the key may be in the certificate's file
	header     http.Header
	dial       time.Duration // 0: not told
}

// hostsFile is one parsed hosts.toml.
type hostsFile struct {
	server hostConfig // base.Host is empty when the file does not name one
	hosts  []hostConfig
}

// certsDir finds a registry's configuration in containerd's layout of directories.
type certsDir struct{ dir string }

// maxHostsFile bounds a hosts.toml, bytes.
const maxHostsFile = 1 << 20

// lookup reads the configuration of registry (host or host:port). ok is false if there is none.
func (c *certsDir) lookup(registry string) (f hostsFile, ok bool, err error) {
	for _, name := range certsDirNames(registry) {
		dir := filepath.Join(c.dir, name)
		st, err := os.Stat(dir)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !st.IsDir() {
			continue
		}
		if err != nil {
			return f, false, certsError(registry, dir, err)
		}
		file := filepath.Join(dir, "hosts.toml")
		b, err := readLimited(file, maxHostsFile)
		if errors.Is(err, fs.ErrNotExist) {
			f, err = dockerCerts(dir)
			if err != nil {
				return f, false, certsError(registry, dir, err)
			}
			return f, true, nil
		}
		if err == nil {
			f, err = parseHosts(b, dir)
		}
		if err != nil {
			return f, false, certsError(registry, file, err)
		}
		return f, true, nil
	}
	return f, false, nil
}

// stamp changes when the files that lookup would read have changed.
func (c *certsDir) stamp(registry string) string {
	for _, name := range certsDirNames(registry) {
		dir := filepath.Join(c.dir, name)
		st, err := os.Stat(dir)
		if err != nil || !st.IsDir() {
			continue
		}
		s := fmt.Sprint(name, st.ModTime().UnixNano())
		if st, err := os.Stat(filepath.Join(dir, "hosts.toml")); err == nil {
			s += fmt.Sprint(" ", st.ModTime().UnixNano(), st.Size())
		}
		return s
	}
	return ""
}

func certsError(registry, file string, err error) error {
	return &Error{Image: registry, Message: clean(file + ": " + err.Error()), Next: "correct the file (containerd's docs/hosts.md describes it)", Err: ErrUsage, Cause: err}
}

// certsDirNames is the order in which containerd looks: host_port_ (where a colon may not be in a
// file's name), host:port, _default.
func certsDirNames(registry string) []string {
	var names []string
	if i := strings.LastIndexByte(registry, ':'); i > 0 && !strings.HasSuffix(registry, "]") {
		names = append(names, registry[:i]+"_"+registry[i+1:]+"_")
	}
	names = append(names, registry, "_default")
	return slices.DeleteFunc(names, func(n string) bool { return strings.ContainsAny(n, `/\`) || n == "." || n == ".." })
}

func readLimited(file string, limit int64) ([]byte, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > limit {
		return nil, fmt.Errorf("not a regular file of at most %d bytes", limit)
	}
	return os.ReadFile(file)
}

// tomlHost is a host's table as it stands in the file.
type tomlHost struct {
	Server       string         `toml:"server"`
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   bool           `toml:"skip_verify"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
	Header       map[string]any `toml:"header"`
}

// parseHosts reads a hosts.toml. Files it names are relative to dir. Unknown keys are ignored, as
// containerd does: newer versions have some.
func parseHosts(b []byte, dir string) (hostsFile, error) {
	var raw struct {
		tomlHost
		Host map[string]tomlHost `toml:"host"`
	}
	var f hostsFile
	if err := toml.Unmarshal(b, &raw); err != nil {
		return f, err
	}
	var err error
	if f.server, err = raw.config(raw.Server, dir); err != nil {
		return f, fmt.Errorf("server: %w", err)
	}
	for _, name := range hostOrder(b, raw.Host) {
		h := raw.Host[name]
		c, err := h.config(name, dir)
		if err == nil && c.base.Host == "" {
			err = errors.New("no host in it")
		}
		if err != nil {
			return f, fmt.Errorf("host %.100q: %w", name, err)
		}
		f.hosts = append(f.hosts, c)
	}
	return f, nil
}

// hostOrder is the names of the host tables as they stand in the file: their order is the order in
// which mirrors are tried, and a decoded map has lost it.
func hostOrder(b []byte, hosts map[string]tomlHost) []string {
	var order []string
	p := unstable.Parser{}
	p.Reset(b)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.Table && e.Kind != unstable.KeyValue {
			continue
		}
		it := e.Key()
		if !it.Next() || string(it.Node().Data) != "host" || !it.Next() {
			continue
		}
		name := string(it.Node().Data)
		if _, ok := hosts[name]; ok && !slices.Contains(order, name) {
			order = append(order, name)
		}
	}
	// What was written in another way (an inline table) comes last, sorted.
	var rest []string
	for name := range hosts {
		if !slices.Contains(order, name) {
			rest = append(rest, name)
		}
	}
	slices.Sort(rest)
	return append(order, rest...)
}

func (t tomlHost) config(server, dir string) (hostConfig, error) {
	c := hostConfig{skipVerify: t.SkipVerify}
	if server != "" {
		u, err := hostURL(server, t.OverridePath)
		if err != nil {
			return c, err
		}
		c.base = u
	}
	if len(t.Capabilities) == 0 {
		c.pull, c.resolve, c.push = true, true, true
	}
	for _, cp := range t.Capabilities {
		switch strings.ToLower(cp) {
		case "pull":
			c.pull = true
		case "resolve":
			c.resolve = true
		case "push":
			c.push = true
		case "referrers":
		default:
			return c, fmt.Errorf("unknown capability %.50q", cp)
		}
	}
	var err error
	if c.ca, err = fileList(t.CA, dir); err != nil {
		return c, fmt.Errorf("ca: %w", err)
	}
	if c.clients, err = clientList(t.Client, dir); err != nil {
		return c, fmt.Errorf("client: %w", err)
	}
	if t.DialTimeout != "" {
		if c.dial, err = time.ParseDuration(t.DialTimeout); err != nil || c.dial <= 0 {
			return c, fmt.Errorf("dial_timeout %.50q is not a duration", t.DialTimeout)
		}
	}
	for k, v := range t.Header {
		vals, err := stringList(v)
		if err != nil {
			return c, fmt.Errorf("header %.100q: %w", k, err)
		}
		if c.header == nil {
			c.header = http.Header{}
		}
		for _, s := range vals {
			if strings.ContainsAny(k+s, "\r\n\x00") || k == "" {
				return c, fmt.Errorf("header %.100q: control characters", k)
			}
			c.header.Add(k, s)
		}
	}
	return c, nil
}

// hostURL reads a host of a hosts.toml as containerd does: https if it says no scheme, and /v2 is
// appended unless the path is to be taken as it stands.
func hostURL(s string, override bool) (url.URL, error) {
	if !strings.HasPrefix(s, "http://") && !strings.HasPrefix(s, "https://") {
		if strings.Contains(s, "://") {
			return url.URL{}, fmt.Errorf("scheme of %.100q is neither http nor https", s)
		}
		s = "https://" + s
	}
	u, err := url.Parse(s)
	if err != nil {
		return url.URL{}, errors.New("not a URL")
	}
	if u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return url.URL{}, errors.New("want a host with at most a path: no user, query or fragment")
	}
	p := path.Clean("/" + u.Path)
	if p == "/" {
		p = ""
	}
	if !override && !strings.HasSuffix(p, "/v2") {
		p += "/v2"
	}
	return url.URL{Scheme: u.Scheme, Host: u.Host, Path: p}, nil
}

func stringList(v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		var out []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, errors.New("want strings")
			}
			out = append(out, s)
		}
		return out, nil
	}
	return nil, errors.New("want a string or a list of strings")
}

func fileList(v any, dir string) ([]string, error) {
	files, err := stringList(v)
	for i, f := range files {
		files[i] = within(dir, f)
	}
	return files, err
}

func within(dir, f string) string {
	if filepath.IsAbs(f) {
		return f
	}
	return filepath.Join(dir, f)
}

// clientList reads client certificates: a file, a list of files, or a list of [certificate, key].
func clientList(v any, dir string) ([][2]string, error) {
	list, ok := v.([]any)
	if !ok {
		list = nil
		if v != nil {
			list = []any{v}
		}
	}
	var out [][2]string
	for _, e := range list {
		pair, err := fileList(e, dir)
		if err != nil {
			return nil, err
		}
		switch len(pair) {
		case 1:
			out = append(out, [2]string{pair[0], pair[0]})
		case 2:
			if pair[1] == filepath.Clean(dir) {
				pair[1] = pair[0] // ["cert", ""]
			}
			out = append(out, [2]string{pair[0], pair[1]})
		default:
			return nil, errors.New("want a file or a pair of files")
		}
	}
	return out, nil
}

// dockerCerts reads a directory without hosts.toml as docker's: *.crt are CAs, X.cert and X.key a client's.
func dockerCerts(dir string) (hostsFile, error) {
	var f hostsFile
	f.server.pull, f.server.resolve, f.server.push = true, true, true
	list, err := os.ReadDir(dir)
	if err != nil {
		return f, err
	}
	for _, e := range list {
		file := filepath.Join(dir, e.Name())
		switch filepath.Ext(file) {
		case ".crt":
			f.server.ca = append(f.server.ca, file)
		case ".cert":
			f.server.clients = append(f.server.clients, [2]string{file, strings.TrimSuffix(file, ".cert") + ".key"})
		}
	}
	return f, nil
}

// tlsConfig loads what the files of c say.
func (c hostConfig) tlsConfig() (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: c.skipVerify}
	if len(c.ca) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		for _, f := range c.ca {
			b, err := readLimited(f, 16<<20)
			if err != nil {
				return nil, fmt.Errorf("CA file %s: %w", f, err)
			}
			if !pool.AppendCertsFromPEM(bytes.TrimSpace(b)) {
				return nil, fmt.Errorf("CA file %s: no certificate in it", f)
			}
		}
		t.RootCAs = pool
	}
	for _, p := range c.clients {
		cert, err := tls.LoadX509KeyPair(p[0], p[1])
		if err != nil {
			return nil, fmt.Errorf("client certificate %s: %w", p[0], err)
		}
		t.Certificates = append(t.Certificates, cert)
	}
	return t, nil
}
