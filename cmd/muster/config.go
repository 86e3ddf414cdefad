package main

import (
	"encoding"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/spf13/viper"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/store"
)

// DefaultConfigFile is read when it exists and --config does not name another.
const DefaultConfigFile = "/etc/muster/agent.yaml"

// Config is every setting of muster. A key of the file such as store.dir is also the flag --store-dir
// and the variable MUSTER_STORE_DIR; a flag wins over a variable, a variable over the file.
type Config struct {
	Store struct {
		// Dir holds what was fetched and is shared by every muster of this host and user. It must be
		// on a disk of this host: two hosts must never share one, and on tmpfs it takes memory from the
		// jobs. Too small a disk means that images are fetched again and again.
		Dir string `mapstructure:"dir" help:"directory of what was fetched; default /var/lib/muster for root, else a local directory of the user"`
		// Quota is the most bytes the store takes on disk. Beyond it whole blobs that no mount uses are
		// evicted, the longest unused first. An image larger than the quota runs, but fetches again what
		// was evicted. Zero is half of the free space, at most 200 GB.
		Quota Size `mapstructure:"quota" help:"largest size of the store; 0: half of the free space, at most 200GB"`
		// AllowNetworkFS permits a store on NFS, Lustre, GPFS and the like. It is slow, and corrupts
		// nothing only as long as one host uses the directory.
		AllowNetworkFS bool `mapstructure:"allow-network-fs" help:"allow the store on a network file system"`
	} `mapstructure:"store"`
	Origin struct {
		// Connections bounds the connections to one registry host. One connection rarely fills a fast
		// link; very many make a registry answer 429.
		Connections int `mapstructure:"connections" help:"most connections to one registry at a time"`
		// Patience is how long an unreachable registry is asked again before a reader gets an error.
		// Short: a restart of the registry kills jobs. Long: a job hangs although nobody will repair it.
		Patience time.Duration `mapstructure:"patience" help:"how long to go on asking a registry that does not answer"`
		// ResolvePatience is the same for names, logins and indexes, where a person waits who may have mistyped.
		ResolvePatience time.Duration `mapstructure:"resolve-patience" help:"how long to go on asking for a manifest or a login"`
		// PlainHTTP lists registries (host or host:port) that are asked without TLS. localhost always is.
		PlainHTTP []string `mapstructure:"plain-http" help:"registries to ask without TLS"`
		// CertsDir is containerd's directory of hosts.toml files: mirrors, CA files, client certificates.
		CertsDir string `mapstructure:"certs-dir" help:"directory of containerd's hosts.toml files"`
	} `mapstructure:"origin"`
	Index struct {
		// SpanSize is the inflated size after which a ztoc has the next restart point. Small: less is
		// inflated for one read, but each span costs up to 32 KiB of window. Large: the other way round.
		SpanSize Size `mapstructure:"span-size" help:"inflated bytes between restart points of indexes that are built"`
		// Use looks for an index beside the image (SOCI). Without it a first run builds one's own.
		Use bool `mapstructure:"use" help:"use an index that is found beside the image"`
	} `mapstructure:"index"`
	// Cores is how many cores may inflate and hash at a time. A running job wants its cores for itself.
	Cores int `mapstructure:"cores" help:"cores to inflate and hash with; 0: all"`
	Run   struct {
		// Runtime starts the command: see muster run --help. Empty chooses what is installed.
		Runtime string `mapstructure:"runtime" help:"what starts commands in images: runc, crun, bwrap, ch-run, apptainer or builtin"`
		// WritableSize bounds what a command may write into its image, which is memory.
		WritableSize Size `mapstructure:"writable-size" help:"most memory for what a command writes into its image; 0: half of the memory"`
	} `mapstructure:"run"`
	Log struct {
		// Level is debug, info, warn or error.
		Level string `mapstructure:"level" help:"debug, info, warn or error"`
		// Format is text or json; auto is text on a terminal and json elsewhere.
		Format string `mapstructure:"format" help:"text, json or auto: json when not on a terminal"`
	} `mapstructure:"log"`
	Agent struct {
		// Name is the scheduler's name of this node: what host lists say. It has to be the name in the certificate.
		Name string `mapstructure:"name" help:"the scheduler's name of this node; default the name in its certificate"`
		// Socket is where commands, hooks and mounts find the agent.
		Socket string `mapstructure:"socket" help:"the agent's socket"`
		// Mounts is the directory of mount points. On a tmpfs nothing of it is left after a reboot.
		Mounts string `mapstructure:"mounts" help:"directory of the mount points of staged images"`
		// Metrics is an address for Prometheus. It tells how much moves, not what.
		Metrics string `mapstructure:"metrics" help:"address of /metrics and /healthz; empty: none"`
		// Admins are user ids that may stage, and end stages, for others.
		Admins []string `mapstructure:"admins" help:"user ids that may stage for others, besides root"`
		// Registries limits where the daemon, which reaches more than users do, fetches from.
		Registries []string `mapstructure:"registries" help:"registries that images may come from, as patterns; empty: all"`
		// Drain is how long SIGTERM waits for stages. Too short and a restart of the agent fails jobs' starts.
		Drain time.Duration `mapstructure:"drain" help:"how long stages may go on after SIGTERM"`
		// Requests times the number of seeds is what a registry gets at once.
		Requests int `mapstructure:"requests" help:"requests to a registry that one stage has under way on this host"`
		// FetchOn and ServeOthers decide how much a running job has its node for itself.
		FetchOn     bool `mapstructure:"fetch-on" help:"let stages go on while a job's tasks run on this host"`
		ServeOthers bool `mapstructure:"serve-others" help:"pass images on to hosts of other jobs while a job's tasks run on this host"`
	} `mapstructure:"agent"`
	Network struct {
		// Control is where gossip goes; few bytes, but never late. The management network is fine.
		Control string `mapstructure:"control" help:"where to gossip: an address, a network (CIDR) or an interface; default the one of the default route"`
		// Data is where images move: the fast network. Nothing falls back to another.
		Data []string `mapstructure:"data" help:"networks (CIDR) or interfaces on which images move; the first is listened on; default as control, no limit"`
		// Port is the same on all hosts, so that a host list is enough to find them.
		Port       int `mapstructure:"port" help:"port for other agents"`
		GossipPort int `mapstructure:"gossip-port" help:"port for gossip"`
	} `mapstructure:"network"`
	Cluster struct {
		// Keys is the directory that makes this host a member. Whoever has it is one.
		Keys string `mapstructure:"keys" help:"directory of this host's certificate and keys"`
		// Join needs a few hosts that are always there.
		Join []string `mapstructure:"join" help:"whom to join: hosts, file:/path or dns:name"`
		// Seeds says who may reach registries. Wrong, and stages wait for hosts that cannot.
		Seeds []string `mapstructure:"seeds" help:"hosts that may reach the registries, as patterns; empty: all"`
		// Hosts chooses between quick gossip and cheap gossip.
		Hosts int `mapstructure:"hosts" help:"about how many hosts the cluster has; 0: as many as join names"`
	} `mapstructure:"cluster"`
	Hooks struct {
		// Jobs is where hooks leave word of jobs for those that come after: on a tmpfs, so that a reboot forgets it.
		Jobs string `mapstructure:"jobs" help:"directory where schedulers' hooks keep what they know of this node's jobs"`
		// Deadline is how long a prolog may wait for an image. Long: a node stands idle. Short: jobs wait in their first step instead,
		// where their owners see it. It is cut below the scheduler's own timeout, which would take the node out of service.
		Deadline time.Duration `mapstructure:"deadline" help:"how long a prolog waits for an image"`
		// Patience is how long a step waits for an image that its prolog has left on its way.
		Patience time.Duration `mapstructure:"patience" help:"how long a job's step waits for its image"`
		// Retries is how often a job whose image failed for a passing reason is queued again, before it is held.
		Retries int `mapstructure:"retries" help:"how often a job is queued again before it is held"`
	} `mapstructure:"hooks"`
	Entry struct {
		// Binds are what every job needs of the host inside its image. One that a host or user has not is left out.
		Binds []string `mapstructure:"binds" help:"paths of the host that jobs find in their images, besides /dev, /proc, /sys, /tmp, home and working directory"`
	} `mapstructure:"entry"`
	// Prestage is what a host fetches before it takes jobs.
	Prestage []string `mapstructure:"prestage" help:"images that the agent fetches when it starts"`
}

// defaults is the configuration of a host without any file. Zeros leave the choice to the package that
// uses them.
func defaults() Config {
	var c Config
	c.Origin.CertsDir = "/etc/containerd/certs.d"
	c.Index.Use = true
	c.Agent.Socket = control.DefaultSocket
	c.Agent.Mounts = "/run/muster/mounts"
	c.Agent.Drain = 20 * time.Second
	c.Agent.Requests = 4
	c.Hooks.Jobs = "/run/muster/jobs"
	c.Hooks.Deadline = 10 * time.Second
	c.Hooks.Patience = 15 * time.Minute
	c.Hooks.Retries = 3
	c.Network.Port = 7464
	c.Network.GossipPort = 7946
	c.Cluster.Keys = "/etc/muster/keys"
	c.Log.Level = "warn"
	c.Log.Format = "auto"
	return c
}

// storeDir is where the store is: as configured, else the place that fits who runs muster.
func (c *Config) storeDir() (string, error) {
	if c.Store.Dir != "" {
		return filepath.Abs(c.Store.Dir)
	}
	return store.DefaultDir()
}

// A Size is a number of bytes, written like 20GiB, 512MiB, 1.5GB or 4096.
type Size int64

var units = []struct {
	name string
	n    float64
}{
	{"KiB", 1 << 10},
	{"MiB", 1 << 20},
	{"GiB", 1 << 30},
	{"TiB", 1 << 40},
	{"kB", 1e3},
	{"KB", 1e3},
	{"MB", 1e6},
	{"GB", 1e9},
	{"TB", 1e12},
	{"K", 1 << 10},
	{"M", 1 << 20},
	{"G", 1 << 30},
	{"T", 1 << 40},
	{"B", 1},
}

// UnmarshalText reads a size; K, M, G and T alone mean KiB to TiB.
func (s *Size) UnmarshalText(b []byte) error {
	text, factor := strings.TrimSpace(string(b)), 1.0
	for _, u := range units {
		if number, ok := strings.CutSuffix(text, u.name); ok {
			text, factor = strings.TrimSpace(number), u.n
			break
		}
	}
	n, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsNaN(n) || n < 0 || n*factor > math.MaxInt64/2 {
		return fmt.Errorf("%q is not a size: write it like 20GiB, 1.5GB or 4096", b)
	}
	*s = Size(n * factor)
	return nil
}

// MarshalText writes a size as String does.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func (s Size) String() string {
	for _, u := range []struct {
		name string
		n    Size
	}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if s >= u.n && s%u.n == 0 {
			return fmt.Sprintf("%d%s", s/u.n, u.name)
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// Set and Type make a Size a flag.
func (s *Size) Set(v string) error { return s.UnmarshalText([]byte(v)) }

// Type is the flag's type in help texts.
func (s *Size) Type() string { return "size" }

// A setting is one leaf of Config.
type setting struct {
	key   string
	help  string
	value reflect.Value // addressable, in the Config that settings was given
}

func (s setting) flag() string { return strings.ReplaceAll(s.key, ".", "-") }
func (s setting) variable() string {
	return "MUSTER_" + strings.ToUpper(strings.NewReplacer(".", "_", "-", "_").Replace(s.key))
}

// settings lists the leaves of c in the order of the struct.
func settings(c *Config) (all []setting) {
	var walk func(prefix string, v reflect.Value)
	walk = func(prefix string, v reflect.Value) {
		for i := range v.NumField() {
			f, key := v.Field(i), prefix+v.Type().Field(i).Tag.Get("mapstructure")
			if f.Kind() == reflect.Struct {
				walk(key+".", f)
				continue
			}
			all = append(all, setting{key, v.Type().Field(i).Tag.Get("help"), f})
		}
	}
	walk("", reflect.ValueOf(c).Elem())
	return all
}

// common are the settings that every command's help shows; 'muster help config' shows the others.
var common = []string{"store.dir", "log.level"}

// flags gives root a flag for each setting.
func (a *app) flags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.String("config", "", "configuration file (default "+DefaultConfigFile+" where it exists)")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "no progress and no notes, only results and errors")
	c := defaults()
	for _, s := range settings(&c) {
		switch v := s.value.Addr().Interface().(type) {
		case *string:
			f.String(s.flag(), *v, s.help)
		case *bool:
			f.Bool(s.flag(), *v, s.help)
		case *int:
			f.Int(s.flag(), *v, s.help)
		case *time.Duration:
			f.Duration(s.flag(), *v, s.help)
		case *[]string:
			f.StringSlice(s.flag(), *v, s.help)
		case *Size:
			f.Var(v, s.flag(), s.help)
		default:
			panic(fmt.Sprintf("config: no flag for %s of type %T", s.key, v))
		}
		f.Lookup(s.flag()).Hidden = !slices.Contains(common, s.key)
	}
}

// configure reads the configuration for cmd and sets up the log.
func (a *app) configure(cmd *cobra.Command) error {
	file, _ := cmd.Flags().GetString("config")
	c, err := load(file, cmd.Flags())
	if err != nil {
		return err
	}
	a.cfg = c
	if file != "" {
		if a.configFile, err = filepath.Abs(file); err != nil {
			return err
		}
	}
	return a.openLog()
}

// load reads file (DefaultConfigFile if empty and there), then variables, then flags.
func load(file string, flags *pflag.FlagSet) (Config, error) {
	c := defaults()
	all := settings(&c)
	v := viper.New()
	v.SetConfigType("yaml")
	optional := file == ""
	if optional {
		file = DefaultConfigFile
	}
	if f, err := os.Open(file); err == nil {
		err = v.ReadConfig(f)
		_ = f.Close()
		if err != nil {
			return c, usagef("configuration %s: %w", file, err)
		}
	} else if !optional || !errors.Is(err, fs.ErrNotExist) {
		return c, usagef("configuration: %w", err)
	}
	// Only the file's keys are there so far.
	known := make([]string, len(all))
	for i, s := range all {
		known[i] = s.key
	}
	for _, k := range v.AllKeys() {
		if !slices.Contains(known, k) {
			return c, usagef("configuration %s: unknown key %q; the nearest known one is %q", file, k, nearest(k, known))
		}
	}
	for _, s := range all {
		v.SetDefault(s.key, s.value.Interface())
		if err := v.BindEnv(s.key, s.variable()); err != nil {
			return c, err
		}
		if flags != nil {
			if f := flags.Lookup(s.flag()); f != nil && f.Changed {
				// As text, so that a flag, a variable and the file are read by the same rules.
				v.Set(s.key, f.Value.String())
				if list, ok := f.Value.(pflag.SliceValue); ok {
					v.Set(s.key, list.GetSlice())
				}
			}
		}
	}
	hook := mapstructure.ComposeDecodeHookFunc(
		mapstructure.StringToTimeDurationHookFunc(),
		mapstructure.StringToSliceHookFunc(","),
		sizeHook,
	)
	if err := v.Unmarshal(&c, viper.DecodeHook(hook)); err != nil {
		return c, usagef("configuration: %w", err)
	}
	return c, c.check()
}

// sizeHook lets mapstructure read a Size from what YAML and variables give.
func sizeHook(_, to reflect.Type, data any) (any, error) {
	if to != reflect.TypeFor[Size]() {
		return data, nil
	}
	if s, ok := data.(Size); ok {
		return s, nil
	}
	var s Size
	var _ encoding.TextUnmarshaler = &s
	return s, s.UnmarshalText(fmt.Append(nil, data))
}

// check refuses values that would only fail later, far from where they were written.
func (c *Config) check() error {
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.Log.Level) {
		return usagef("log.level is %q: it must be debug, info, warn or error", c.Log.Level)
	}
	if !slices.Contains([]string{"auto", "text", "json"}, c.Log.Format) {
		return usagef("log.format is %q: it must be auto, text or json", c.Log.Format)
	}
	if p, g := c.Network.Port, c.Network.GossipPort; p < 1 || p > 65535 || g < 1 || g > 65535 || p == g {
		return usagef("network.port %d and network.gossip-port %d must be two ports", p, g)
	}
	for _, a := range c.Agent.Admins {
		if _, err := strconv.ParseUint(a, 10, 32); err != nil {
			return usagef("agent.admins has %q: it must be user ids", a)
		}
	}
	for _, p := range slices.Concat(c.Agent.Registries, c.Cluster.Seeds) {
		if _, err := path.Match(p, ""); err != nil {
			return usagef("%q is not a pattern: %w", p, err)
		}
	}
	if c.Agent.Drain < 0 || c.Agent.Requests < 1 || c.Cluster.Hosts < 0 {
		return usagef("agent.drain, agent.requests and cluster.hosts must not be negative, requests not 0")
	}
	if c.Hooks.Deadline <= 0 || c.Hooks.Patience <= 0 || c.Hooks.Retries < 0 || !filepath.IsAbs(c.Hooks.Jobs) {
		return usagef("hooks.deadline and hooks.patience must be more than 0, hooks.retries not negative, hooks.jobs an absolute path")
	}
	for _, b := range c.Entry.Binds {
		if !filepath.IsAbs(b) || filepath.Clean(b) == "/" {
			return usagef("entry.binds has %q: it must be absolute paths beneath /", b)
		}
	}
	if c.Cores < 0 || c.Origin.Connections < 0 || c.Origin.Patience < 0 || c.Origin.ResolvePatience < 0 {
		return usagef("cores, origin.connections and patience must not be negative")
	}
	if s := c.Index.SpanSize; s != 0 && (s < 64<<10 || s > 64<<20) {
		return usagef("index.span-size is %s: it must lie between 64KiB and 64MiB", s)
	}
	return nil
}

// nearest is the known key with the smallest edit distance from key. A key named without its group
// (quota for store.quota) is near too.
func nearest(key string, known []string) string {
	best, least := "", math.MaxInt
	for _, k := range known {
		d := distance(key, k)
		if _, leaf, ok := strings.Cut(k, "."); ok {
			d = min(d, distance(key, leaf)+1)
		}
		if d < least {
			best, least = k, d
		}
	}
	return best
}

// distance is Levenshtein's: inserts, deletions and replacements of one byte that lead from a to b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}

// openLog makes slog write to the standard error as configured.
func (a *app) openLog() error {
	var level slog.Level
	if err := level.UnmarshalText([]byte(a.cfg.Log.Level)); err != nil {
		return usage(err)
	}
	a.level.Set(level)
	o := &slog.HandlerOptions{Level: &a.level}
	text := a.cfg.Log.Format == "text"
	if a.cfg.Log.Format == "auto" {
		text = isTerminal(a.err)
	}
	if text {
		slog.SetDefault(slog.New(slog.NewTextHandler(a.err, o)))
	} else {
		slog.SetDefault(slog.New(slog.NewJSONHandler(a.err, o)))
	}
	return nil
}

func configTopic() *cobra.Command {
	var b strings.Builder
	b.WriteString(`Settings, each a key of the configuration file, a flag and a variable. A flag wins
over a variable, a variable over the file (` + DefaultConfigFile + `, or --config).
configs/agent.yaml is a sample with every key explained.

`)
	c := defaults()
	for _, s := range settings(&c) {
		fmt.Fprintf(&b, "  %s\n      --%s  %s\n      %s\n", s.key, s.flag(), s.variable(), s.help)
	}
	return &cobra.Command{Use: "config", Short: "every setting: key, flag and variable", Long: b.String()}
}
