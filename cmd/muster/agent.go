package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/configs"
	"github.com/muster-hpc/muster/peer"
)

func (a *app) agentCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "agent",
		Short: "the daemon of a host: stages images together with the agents of other hosts",
		Long: `Runs the daemon in the foreground: systemd, or whoever starts it, keeps it. 'muster agent init' makes
the keys that hosts of a cluster know each other by, and a configuration to start from.

SIGTERM drains: no new stage is taken, those under way have agent.drain to end; mounts stay and are
found again by the next agent. SIGHUP reads certificates, gossip keys and the log level again.`,
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.agent(cmd) },
	}
	c.AddCommand(a.agentInit())
	return c
}

func (a *app) agent(cmd *cobra.Command) error {
	signals := make(chan os.Signal, 4)
	a.handOver(signals)
	ctx, stop := context.WithCancel(cmd.Context())
	defer stop()
	id, err := peer.LoadIdentity(a.cfg.Cluster.Keys)
	if err != nil {
		return fmt.Errorf("keys of this host: %w; 'muster agent init' makes them", err)
	}
	o, err := a.agentOptions(id)
	if err != nil {
		return err
	}
	st, err := a.openStore()
	if err != nil {
		return err
	}
	defer st.Close()
	o.Store, o.MountConf.Quota, o.MountConf.AllowNetwork = st, st.Quota(), a.cfg.Store.AllowNetworkFS
	if o.MountConf.Log, err = mountLog(st.Dir()); err != nil {
		return err
	}
	defer o.MountConf.Log.Close()
	d, err := agent.New(o)
	if err != nil {
		return err
	}
	go func() {
		for s := range signals {
			if s == syscall.SIGHUP {
				a.reload(cmd, id, d)
				continue
			}
			notify("STOPPING=1")
			stop()
		}
	}()
	return d.Run(ctx, func() { notify("READY=1") })
}

// agentOptions are what the configuration makes of an agent.
func (a *app) agentOptions(id *peer.Identity) (agent.Options, error) {
	cfg := a.cfg
	o := agent.Options{
		Name: cfg.Agent.Name, Version: version, Socket: cfg.Agent.Socket, Mounts: cfg.Agent.Mounts, Metrics: cfg.Agent.Metrics,
		Port: cfg.Network.Port, SpanSize: int64(cfg.Index.SpanSize), NoIndex: !cfg.Index.Use, Tool: "muster " + version,
		Prestage: cfg.Prestage, FetchOn: cfg.Agent.FetchOn, ServeOthers: cfg.Agent.ServeOthers, Requests: cfg.Agent.Requests, Drain: cfg.Agent.Drain, Patience: cfg.Origin.Patience,
		ExitCode: exitCode, Log: slog.Default(),
		// What somebody may have to answer for is told whatever the level is.
		Audit: slog.New(slog.NewJSONHandler(a.err, nil)),
	}
	if o.Name == "" {
		o.Name = id.Name()
	} else if o.Name != id.Name() {
		return o, usagef("agent.name is %s, but the certificate in %s is of %s", o.Name, cfg.Cluster.Keys, id.Name())
	}
	for _, s := range cfg.Agent.Admins {
		n, _ := strconv.ParseUint(s, 10, 32) // checked when the configuration was read
		o.Admins = append(o.Admins, uint32(n))
	}
	o.Seed = func(host string) bool { return len(cfg.Cluster.Seeds) == 0 || matches(cfg.Cluster.Seeds, host) }
	o.Images = func(ref string) error {
		r, err := origin.ParseReference(ref)
		if err != nil {
			return err
		}
		if len(cfg.Agent.Registries) > 0 && !matches(cfg.Agent.Registries, r.Registry) {
			return fmt.Errorf("image %s: registry %q is not among agent.registries %v", ref, r.Registry, cfg.Agent.Registries)
		}
		return nil
	}
	controlAddr, _, err := localAddr(cfg.Network.Control)
	if err != nil {
		return o, usagef("network.control: %w", err)
	}
	dataAddr := controlAddr
	for i, s := range cfg.Network.Data {
		addr, prefix, err := localAddr(s)
		if err != nil {
			return o, usagef("network.data: %w", err)
		}
		if i == 0 {
			dataAddr = addr
		}
		o.Data = append(o.Data, prefix)
	}
	o.Listen = []string{netip.AddrPortFrom(dataAddr, uint16(cfg.Network.Port)).String()}
	o.Network = peer.NewTCP(id, peer.TCPOptions{Data: o.Data, Dial: dialPatience})
	if keys, err := peer.LoadGossipKeys(filepath.Join(cfg.Cluster.Keys, peer.GossipFile)); err == nil {
		o.Gossip = &peer.GossipOptions{
			Self: peer.Member{Control: netip.AddrPortFrom(controlAddr, uint16(cfg.Network.GossipPort))},
			Keys: keys, Hosts: cfg.Cluster.Hosts, Log: slog.Default(),
		}
		if o.Gossip.Seeds, err = gossipSeeds(cfg.Cluster.Join); err != nil {
			return o, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return o, err
	}
	o.Repository, err = a.repositories()
	return o, err
}

// dialPatience is how long a host has to take a connection. One that is switched off costs its children so much, once.
const dialPatience = time.Second

// repositories opens repositories for the agent: with what a user's own process has handed in, or with nothing.
func (a *app) repositories() (func(string, map[string]string) (origin.Repository, error), error) {
	make := func(secret map[string]string) (*origin.Client, error) {
		return origin.New(origin.Options{
			Version: version, CertsDir: a.cfg.Origin.CertsDir, PlainHTTP: a.cfg.Origin.PlainHTTP, MaxConns: a.cfg.Origin.Connections,
			MaxWait: agentWait, ResolveWait: a.cfg.Origin.ResolvePatience,
			Credentials: func(_ context.Context, host, _ string) (origin.Credential, error) {
				user, password, ok := strings.Cut(secret[host], ":")
				if !ok {
					return origin.Credential{}, nil
				}
				return origin.Credential{Username: user, Password: password}, nil
			},
		})
	}
	anonymous, err := make(nil)
	return func(ref string, secret map[string]string) (origin.Repository, error) {
		r, err := origin.ParseReference(ref)
		if err != nil {
			return nil, err
		}
		c := anonymous
		if len(secret) > 0 {
			if c, err = make(secret); err != nil { // its tokens are not another user's
				return nil, err
			}
		}
		return c.Repository(r)
	}, err
}

// agentWait is how long the agent waits for a registry that gives nothing before it looks for the bytes at other hosts.
const agentWait = 10 * time.Second

func gossipSeeds(join []string) (peer.Seeds, error) {
	var all []peer.Seeds
	var hosts []string
	for _, j := range join {
		if f, ok := strings.CutPrefix(j, "file:"); ok {
			all = append(all, peer.SeedFile(f))
		} else if n, ok := strings.CutPrefix(j, "dns:"); ok {
			all = append(all, peer.SeedDNS(n))
		} else if strings.Contains(j, ":") { // an address, which no host list has
			hosts = append(hosts, j)
		} else {
			more, err := expandHosts(j)
			if err != nil {
				return nil, err
			}
			hosts = append(hosts, more...)
		}
	}
	if len(hosts) > 0 {
		all = append(all, peer.SeedList(hosts...))
	}
	if len(all) == 0 {
		return nil, nil
	}
	return peer.AllSeeds(all...), nil
}

func matches(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, name)
		return ok && err == nil
	})
}

// localAddr is an address of this host and the network it is in: of s, which is an address, a network or an interface; empty is the
// one that leads to the default route.
func localAddr(s string) (netip.Addr, netip.Prefix, error) {
	whole := func(a netip.Addr) (netip.Addr, netip.Prefix, error) {
		return a, netip.PrefixFrom(a, a.BitLen()), nil
	}
	if s == "" {
		for _, to := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} { // nothing is sent
			if c, err := net.Dial("udp", to); err == nil {
				defer c.Close()
				return whole(c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap())
			}
		}
		return whole(netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return whole(a)
	}
	network, netErr := netip.ParsePrefix(s)
	all, err := net.Interfaces()
	if err != nil {
		return netip.Addr{}, netip.Prefix{}, err
	}
	for _, i := range all {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil || p.Addr().IsLinkLocalUnicast() {
				continue
			}
			if netErr == nil && network.Contains(p.Addr()) {
				return p.Addr(), network.Masked(), nil
			}
			if netErr != nil && i.Name == s {
				return p.Addr(), p.Masked(), nil
			}
		}
	}
	return netip.Addr{}, netip.Prefix{}, fmt.Errorf("%q is no address, interface or network of this host", s)
}

// reload reads again what may change under a running agent.
func (a *app) reload(cmd *cobra.Command, id *peer.Identity, d *agent.Agent) {
	file, _ := cmd.Flags().GetString("config")
	c, err := load(file, cmd.Flags())
	if err == nil {
		err = id.Reload()
	}
	if err == nil {
		var keys [][]byte
		if keys, err = peer.LoadGossipKeys(filepath.Join(a.cfg.Cluster.Keys, peer.GossipFile)); err == nil {
			err = d.SetGossipKeys(keys)
		} else if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err != nil {
		slog.Error("SIGHUP: nothing is changed", "cause", err)
		return
	}
	var restart []string
	was := settings(&a.cfg)
	for i, s := range settings(&c) {
		if s.key != "log.level" && !reflect.DeepEqual(s.value.Interface(), was[i].value.Interface()) {
			restart = append(restart, s.key)
		}
	}
	var level slog.Level
	if level.UnmarshalText([]byte(c.Log.Level)) == nil {
		a.level.Set(level)
	}
	slog.Info("SIGHUP: certificates, gossip keys and log level were read again", "needs a restart", restart)
}

// notify tells systemd how the service is, when it wants to know (sd_notify(3)).
func notify(state string) {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return
	}
	c, err := net.Dial("unixgram", socket)
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = c.Write([]byte(state))
}

func (a *app) agentInit() *cobra.Command {
	var hosts string
	var life time.Duration
	c := &cobra.Command{
		Use:   "init DIR",
		Short: "make a cluster's CA, the keys of its hosts, and a configuration",
		Long: `Makes in DIR, which belongs on the administrator's host:

  ca/              the cluster's CA: its key goes to no compute node
  hosts/NAME/      what makes NAME a member: copy it to cluster.keys (/etc/muster/keys) there
  agent.yaml       the configuration with every key explained, for /etc/muster/agent.yaml on all hosts

Calling it again with other hosts adds them; with the same ones it renews their certificates.`,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			names, err := expandHosts(hosts)
			if err != nil {
				return err
			}
			if len(names) == 0 {
				name, err := os.Hostname()
				if err != nil {
					return err
				}
				short, _, _ := strings.Cut(name, ".")
				names = []string{short}
			}
			return a.initCluster(args[0], names, life)
		},
	}
	c.Flags().StringVar(&hosts, "hosts", "", "names of the hosts as the scheduler has them, such as node[001-016]; default this host's")
	c.Flags().DurationVar(&life, "life", 365*24*time.Hour, "how long certificates are good")
	a.jsonFlag(c)
	return c
}

func (a *app) initCluster(dir string, names []string, life time.Duration) error {
	ca := filepath.Join(dir, "ca")
	made := struct {
		CA     string   `json:"ca"`
		Hosts  []string `json:"hosts"`
		Config string   `json:"config"`
	}{ca, nil, filepath.Join(dir, "agent.yaml")}
	if _, err := os.Stat(filepath.Join(ca, peer.CAKeyFile)); errors.Is(err, fs.ErrNotExist) {
		if err := peer.Init(ca); err != nil {
			return err
		}
	}
	for _, n := range names {
		i, err := peer.Issue(ca, n, nil, life)
		if err != nil {
			return err
		}
		to := filepath.Join(dir, "hosts", n)
		if err := i.Write(to); err != nil {
			return err
		}
		made.Hosts = append(made.Hosts, to)
	}
	f, err := os.OpenFile(made.Config, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err == nil {
		_, err = f.Write(configs.Agent)
		err = errors.Join(err, f.Close())
	}
	if err != nil && !errors.Is(err, fs.ErrExist) { // one that somebody has changed stays
		return err
	}
	return a.result(made, func(w io.Writer) {
		fmt.Fprintf(w, "CA: %s (keep it off compute nodes)\nhosts: %d, each to be copied to its own %s\nconfiguration: %s\n",
			made.CA, len(made.Hosts), a.cfg.Cluster.Keys, made.Config)
	})
}
