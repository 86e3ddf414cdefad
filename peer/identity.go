package peer

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// Files of an identity in its directory, and of the CA in the admin's.
const (
	CAFile     = "ca.pem"      // certificates of the cluster's CA; two during a change of CA
	CAKeyFile  = "ca.key"      // on the admin's host only
	HostFile   = "host.pem"    // this host's certificate
	KeyFile    = "host.key"    // and its key
	GossipFile = "gossip.keys" // base64, one a line; the first is used, all are understood
)

// An Identity is who this host is: its certificate and key, and the CA whose certificates it believes. It looks at its
// files again, at most once a second, when a connection is made; so a certificate is rotated by putting another in
// its place (the key first), and a CA by adding the new one to ca.pem everywhere, then the certificates, then taking the old one out. Open connections go on
// until the certificate that they began with expires.
type Identity struct {
	dir string

	mu     sync.Mutex
	looked time.Time
	stamp  [3]fileStamp
	cert   *tls.Certificate
	pool   *x509.CertPool
}

type fileStamp struct {
	size int64
	mod  time.Time
}

// LoadIdentity reads an identity from a directory.
func LoadIdentity(dir string) (*Identity, error) {
	id := &Identity{dir: dir}
	if err := id.load(); err != nil {
		return nil, err
	}
	return id, nil
}

// Name is what this host is called: the name in its certificate.
func (id *Identity) Name() string {
	cert, _ := id.now()
	return cert.Leaf.DNSNames[0]
}

// Expires is when this host's certificate ends.
func (id *Identity) Expires() time.Time {
	cert, _ := id.now()
	return cert.Leaf.NotAfter
}

// load reads the files. Caller holds id.mu, or is the only one.
func (id *Identity) load() error {
	stamp, err := id.stat()
	if err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(id.dir, HostFile), filepath.Join(id.dir, KeyFile))
	if err != nil {
		return fmt.Errorf("identity in %s: %w", id.dir, err)
	}
	if len(cert.Leaf.DNSNames) == 0 {
		return fmt.Errorf("identity in %s: %s names no host", id.dir, HostFile)
	}
	if id.cert != nil && cert.Leaf.DNSNames[0] != id.cert.Leaf.DNSNames[0] {
		return fmt.Errorf("identity in %s: the name changed from %s to %s", id.dir, id.cert.Leaf.DNSNames[0], cert.Leaf.DNSNames[0])
	}
	text, err := os.ReadFile(filepath.Join(id.dir, CAFile))
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return fmt.Errorf("identity in %s: no certificate in %s", id.dir, CAFile)
	}
	id.cert, id.pool, id.stamp, id.looked = &cert, pool, stamp, time.Now()
	return nil
}

func (id *Identity) stat() (stamp [3]fileStamp, err error) {
	for i, name := range []string{HostFile, KeyFile, CAFile} {
		fi, err := os.Stat(filepath.Join(id.dir, name))
		if err != nil {
			return stamp, err
		}
		stamp[i] = fileStamp{fi.Size(), fi.ModTime()}
	}
	return stamp, nil
}

// now is the certificate and pool to use. Files that cannot be read, or not together (a rotation is half done), leave the old ones in use.
func (id *Identity) now() (*tls.Certificate, *x509.CertPool) {
	id.mu.Lock()
	defer id.mu.Unlock()
	if time.Since(id.looked) > time.Second {
		id.looked = time.Now()
		if stamp, err := id.stat(); err == nil && stamp != id.stamp {
			id.load()
		}
	}
	return id.cert, id.pool
}

// Reload looks at the files at once, and says what is wrong with them.
func (id *Identity) Reload() error {
	id.mu.Lock()
	defer id.mu.Unlock()
	return id.load()
}

func (id *Identity) config() *tls.Config {
	cert, pool := id.now()
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		Certificates:                []tls.Certificate{*cert},
		RootCAs:                     pool,
		ClientCAs:                   pool,
		SessionTicketsDisabled:      true, // a resumed session would not look at certificates again
		DynamicRecordSizingDisabled: true, // full records from the first byte on
	}
}

// server is the configuration of the accepting side: any host of the cluster may connect.
func (id *Identity) server() *tls.Config {
	c := id.config()
	c.NextProtos = []string{protoAsk, protoRanges}
	c.ClientAuth = tls.RequireAndVerifyClientCert
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if s.NegotiatedProtocol == "" {
			return errors.New("no protocol was agreed on")
		}
		return named(s, "")
	}
	return c
}

// client is the configuration of the dialling side: only the host of that name will do.
func (id *Identity) client(name, proto string) *tls.Config {
	c := id.config()
	c.NextProtos = []string{proto}
	// The name is looked at by named: node names need not be host names in DNS' sense, and what is compared is all of the name. The chain is
	// verified there as well, since InsecureSkipVerify turns off both.
	c.InsecureSkipVerify = true
	roots := c.RootCAs
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if s.NegotiatedProtocol != proto {
			return fmt.Errorf("the other end does not speak %s", proto)
		}
		between := x509.NewCertPool()
		for _, cert := range s.PeerCertificates[1:] {
			between.AddCert(cert)
		}
		if _, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
			return fmt.Errorf("%w: %w", ErrDenied, err)
		}
		return named(s, name)
	}
	return c
}

// named checks that the other end has a name, and the one that is wanted.
func named(s tls.ConnectionState, want string) error {
	if len(s.PeerCertificates) == 0 || len(s.PeerCertificates[0].DNSNames) == 0 {
		return fmt.Errorf("%w: a certificate without a name", ErrDenied)
	}
	names := s.PeerCertificates[0].DNSNames
	if want != "" && !slices.Contains(names, want) {
		return fmt.Errorf("%w: the certificate is for %v, not for %s", ErrDenied, names, want)
	}
	return nil
}

func readPEM(path, kind string) ([]byte, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s holds no %s", path, kind)
	}
	return block.Bytes, nil
}
