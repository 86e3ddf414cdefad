package peer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"fmt"
)

// What a host has said once and others pass on (a verdict about a user) is signed with the key of its certificate, and believed as long as
// that certificate is.

// signContext keeps a signature made here from being taken for one of TLS, or of anything else.
const signContext = "muster: a host of the cluster says\x00"

// Sign signs b as this host. The signature carries the host's certificate: some 600 bytes.
func (c *Client) Sign(b []byte) ([]byte, error) { return c.net.sign(b) }

// Signer is the name of the host that has signed b: ErrDenied when nobody of the cluster has.
func (c *Client) Signer(b, signature []byte) (string, error) { return c.net.signer(b, signature) }

func (t *tcp) sign(b []byte) ([]byte, error) {
	cert, _ := t.id.now()
	key, ok := cert.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("peer: the host's key cannot sign")
	}
	message := append([]byte(signContext), b...)
	var by []byte
	var err error
	if _, plain := key.Public().(ed25519.PublicKey); plain {
		by, err = key.Sign(rand.Reader, message, crypto.Hash(0))
	} else {
		sum := sha256.Sum256(message)
		by, err = key.Sign(rand.Reader, sum[:], crypto.SHA256)
	}
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, der := range cert.Certificate {
		out = binary.BigEndian.AppendUint16(out, uint16(len(der)))
		out = append(out, der...)
	}
	return append(binary.BigEndian.AppendUint16(out, 0), by...), nil
}

func (t *tcp) signer(b, signature []byte) (string, error) {
	bad := func(why any) (string, error) { return "", fmt.Errorf("%w: signature: %v", ErrDenied, why) }
	var chain []*x509.Certificate
	for {
		if len(signature) < 2 || len(chain) > 4 {
			return bad("malformed")
		}
		n := int(binary.BigEndian.Uint16(signature))
		signature = signature[2:]
		if n == 0 {
			break
		}
		if n > len(signature) {
			return bad("malformed")
		}
		cert, err := x509.ParseCertificate(signature[:n])
		if err != nil {
			return bad(err)
		}
		chain, signature = append(chain, cert), signature[n:]
	}
	if len(chain) == 0 || len(chain[0].DNSNames) == 0 {
		return bad("no certificate with a name")
	}
	_, roots := t.id.now()
	between := x509.NewCertPool()
	for _, cert := range chain[1:] {
		between.AddCert(cert)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
		return bad(err)
	}
	algorithm := x509.SHA256WithRSA
	switch chain[0].PublicKey.(type) {
	case *ecdsa.PublicKey:
		algorithm = x509.ECDSAWithSHA256
	case ed25519.PublicKey:
		algorithm = x509.PureEd25519
	}
	if err := chain[0].CheckSignature(algorithm, append([]byte(signContext), b...), signature); err != nil {
		return bad(err)
	}
	return chain[0].DNSNames[0], nil
}

// In memory a signature is the signer's name and a hash: there is nobody to keep out.
func (h memoryHost) sign(b []byte) ([]byte, error) {
	sum := sha256.Sum256(b)
	return append(sum[:], h.name...), nil
}

func (h memoryHost) signer(b, signature []byte) (string, error) {
	sum := sha256.Sum256(b)
	if len(signature) <= len(sum) || [sha256.Size]byte(signature) != sum {
		return "", fmt.Errorf("%w: signature", ErrDenied)
	}
	return string(signature[len(sum):]), nil
}
