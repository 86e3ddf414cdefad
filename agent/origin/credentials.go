package origin

import (
	"context"
	"fmt"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// A Credential is what a host is shown. At most one of its three forms is used: a registry token as it
// is, an identity token (OAuth2 refresh token), or user and password. The zero Credential is anonymous.
type Credential struct {
	Username, Password string
	IdentityToken      string
	RegistryToken      string
}

// Empty reports whether there is nothing to show.
func (c Credential) Empty() bool { return c == Credential{} }

// String hides everything: credentials end in logs by accident.
func (c Credential) String() string {
	if c.Empty() {
		return "anonymous"
	}
	return "credential of " + clean(c.Username)
}

// GoString hides everything too.
func (c Credential) GoString() string { return c.String() }

// Credentials finds the credential for a repository ("group/name") of a host ("docker.io", "ghcr.io",
// "mirror:5000"). Mirrors are asked for under their own host, so that nothing leaks from one to the other.
type Credentials func(ctx context.Context, host, repository string) (Credential, error)

// Static is the same credential for one host and none for others.
func Static(host string, c Credential) Credentials {
	return func(_ context.Context, h, _ string) (Credential, error) {
		if h == host {
			return c, nil
		}
		return Credential{}, nil
	}
}

// Docker looks where docker, podman and skopeo of the calling user look: ~/.docker/config.json,
// $DOCKER_CONFIG, $REGISTRY_AUTH_FILE, containers/auth.json, and the credential helpers named there.
// It runs programs of the user, so a daemon running as root must not use it for others.
func Docker() Credentials {
	return func(ctx context.Context, host, repository string) (Credential, error) {
		if host == dockerHub || host == dockerHubAPI {
			host = name.DefaultRegistry
		}
		reg, err := name.NewRegistry(host)
		if err != nil {
			return Credential{}, err
		}
		a, err := authn.Resolve(ctx, authn.DefaultKeychain, reg.Repo(repository))
		if err != nil {
			return Credential{}, fmt.Errorf("docker's config: %w", err)
		}
		if a == authn.Anonymous {
			return Credential{}, nil
		}
		cfg, err := authn.Authorization(ctx, a)
		if err != nil {
			return Credential{}, fmt.Errorf("docker's config: %w", err)
		}
		return Credential{
			Username: cfg.Username, Password: cfg.Password,
			IdentityToken: cfg.IdentityToken, RegistryToken: cfg.RegistryToken,
		}, nil
	}
}
