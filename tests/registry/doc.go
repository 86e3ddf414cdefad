// Package registry is the registry side of muster's tests, benches and demo: real and embedded registries,
// and a proxy in front of either that throttles, breaks things on purpose and keeps a log.
//
//  1. [Start] runs an embedded registry on a loopback port, with everything on disk (a gigabyte image does
//     not sit in memory), ranges on blobs, and the referrers API if wished. [NewHandler] is the same as a
//     handler. [StartDebian] runs Debian's docker-registry 2.8.2, the real server.
//  2. [StartProxy] listens in front of a handler: of [NewHandler] in the same process, or of another server
//     by [Upstream]. Its methods change what it does at any time: [Proxy.SetRate], [Proxy.SetLatency],
//     [Proxy.Inject], [Proxy.RequireTokens], [Proxy.RedirectBlobs], [Proxy.Down] and [Proxy.Up].
//  3. [Proxy.Log], [Proxy.Count] and [Proxy.Bytes] tell what was asked and answered.
//  4. [Push] copies an image of an OCI layout directory to a registry.
//
// A test that wants a slow registry with an image in it:
//
//	h, _ := registry.NewHandler(t.TempDir(), registry.Options{})
//	p, _ := registry.StartProxy(h)
//	defer p.Close()
//	registry.Push(ctx, p.Addr+"/debian:1", layoutDir, "")
//	p.ResetLog()
//	p.SetRate(registry.Gbit)
//	p.Inject(registry.Match{Kind: registry.Blob}, 1, registry.CutAfter(100_000))
//	…
//	if n := p.Count(registry.Match{Kind: registry.Blob}); n > 20 { … }
//
// Nothing here imports testing, so that the demo can use it too. It is not a registry for production: no
// authentication of its own, no garbage collection, one repository's blobs are visible in all.
package registry
