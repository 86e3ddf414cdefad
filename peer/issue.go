package peer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// An Issued is what one host needs to be part of the cluster. It goes to the host over a channel that keeps Key secret.
type Issued struct {
	Name                  string
	CA, Cert, Key, Gossip []byte // contents of CAFile, HostFile, KeyFile and GossipFile
}

// Init makes a cluster's trust in dir: the CA, and the first gossip key. dir belongs on the admin's host, not on compute nodes. It
// fails when there is a CA already. The CA lives for ten years.
func Init(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(dir, CAKeyFile)); err == nil {
		return fmt.Errorf("%s: %w", filepath.Join(dir, CAKeyFile), os.ErrExist)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := newSerial()
	if err != nil {
		return err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: fmt.Sprintf("muster cluster %x", serial.Bytes()[:4])},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.AddDate(10, 0, 0),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	gossip, err := NewGossipKey()
	if err != nil {
		return err
	}
	return writeAll(dir, []file{
		{CAKeyFile, pemOf("PRIVATE KEY", der), 0o600},
		{GossipFile, []byte(gossip + "\n"), 0o600},
		{CAFile, pemOf("CERTIFICATE", cert), 0o644},
	})
}

// skew is how far clocks of hosts may be apart: certificates begin that much earlier.
const skew = 10 * time.Minute

// Issue makes a key and certificate for a host, with the CA in dir. name is the scheduler's node name; addresses are for tools that
// look at them, muster itself checks the name only. life is the time until it must be issued again.
func Issue(dir, name string, addresses []netip.Addr, life time.Duration) (*Issued, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if life <= 0 {
		return nil, fmt.Errorf("a certificate that lives %v", life)
	}
	der, err := readPEM(filepath.Join(dir, CAKeyFile), "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, CAKeyFile), err)
	}
	caKey, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: not an ECDSA key", filepath.Join(dir, CAKeyFile))
	}
	caText, err := os.ReadFile(filepath.Join(dir, CAFile))
	if err != nil {
		return nil, err
	}
	ca, err := ownCA(caText, caKey)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, CAFile), err)
	}
	gossip, err := os.ReadFile(filepath.Join(dir, GossipFile))
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name[:min(len(name), 64)]},
		DNSNames:     []string{name},
		NotBefore:    now.Add(-skew),
		NotAfter:     now.Add(life),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, a := range addresses {
		template.IPAddresses = append(template.IPAddresses, a.AsSlice())
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey)
	if err != nil {
		return nil, err
	}
	if der, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return nil, err
	}
	return &Issued{
		Name: name, CA: caText, Gossip: gossip,
		Cert: pemOf("CERTIFICATE", cert), Key: pemOf("PRIVATE KEY", der),
	}, nil
}

// Write puts what was issued into a directory, from where LoadIdentity and LoadGossipKeys read it. An identity that is there already
// is replaced: that is how it is rotated.
func (i *Issued) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return writeAll(dir, []file{
		{CAFile, i.CA, 0o644}, {GossipFile, i.Gossip, 0o600}, {KeyFile, i.Key, 0o600}, {HostFile, i.Cert, 0o644},
	})
}

// ownCA is the certificate of text that belongs to key: during a change of CA there are two.
func ownCA(text []byte, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return nil, fmt.Errorf("no certificate for the CA's key")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		if key.PublicKey.Equal(cert.PublicKey) {
			return cert, nil
		}
	}
}

// checkName takes what schedulers use as node names.
func checkName(name string) error {
	if name == "" || len(name) > MaxName {
		return fmt.Errorf("a host name of %d bytes", len(name))
	}
	for _, r := range name {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_' && r != '.' {
			return fmt.Errorf("host name %q: only letters, digits, '-', '_' and '.' are taken", name)
		}
	}
	return nil
}

func newSerial() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, err
	}
	return serial.SetBit(serial, 126, 1), nil // always 16 bytes
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

type file struct {
	name string
	text []byte
	mode os.FileMode
}

// writeAll replaces files one after the other, each at once.
func writeAll(dir string, files []file) error {
	for _, f := range files {
		t, err := os.CreateTemp(dir, "."+f.name+".*")
		if err != nil {
			return err
		}
		_, err = t.Write(f.text)
		if err == nil {
			err = t.Chmod(f.mode)
		}
		if err == nil {
			err = t.Sync()
		}
		t.Close()
		if err == nil {
			err = os.Rename(t.Name(), filepath.Join(dir, f.name))
		}
		if err != nil {
			os.Remove(t.Name())
			return err
		}
	}
	return nil
}

// NewGossipKey makes a key for gossip, as it stands in GossipFile.
func NewGossipKey() (string, error) {
	var key [32]byte
	if _, err := rand.Read(key[:]); err != nil {
		return "", err
	}
	return base64.StdEncoding.EncodeToString(key[:]), nil
}

// LoadGossipKeys reads gossip keys: the first is used for sending, all for receiving. To rotate: add the new key behind the old
// one everywhere, then put it first everywhere, then take the old one out.
func LoadGossipKeys(path string) ([][]byte, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var keys [][]byte
	for _, line := range strings.Fields(string(text)) {
		key, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(key) != 32 {
			return nil, fmt.Errorf("%s: a key is 32 bytes in base64", path)
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%s: no key", path)
	}
	return keys, nil
}
