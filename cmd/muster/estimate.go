package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/costmodel"
)

// badScenario is a wrong argument of an estimate: one line, exit code 2.
func badScenario(format string, args ...any) error {
	return fmt.Errorf("%w: %s", costmodel.ErrScenario, fmt.Sprintf(format, args...))
}

// estimateFlags are what an estimate is asked with.
type estimateFlags struct {
	hosts    int
	money    priceFlags
	registry string
	model    string
	times    int
	platform string
	html     string
	measure  bool
	given    map[string]*string // by parameter
}

func (a *app) estimateCommand() *cobra.Command {
	f := estimateFlags{times: 1, given: map[string]*string{}}
	c := &cobra.Command{
		Use:   "estimate IMAGE|SIZES...",
		Short: "tell what starting images on many hosts costs, in time and money, before anything is pulled",
		Long: `Tells for nine ways of bringing images to hosts how long the median and the slowest host
take until they can start, how many node-hours all hosts wait, what that costs, and how
much leaves the registry. Only manifests are fetched. Several images are pulled one after
another, and hosts keep the layers that they have.

IMAGE is a name in a registry or an OCI layout (oci:/path:tag). SIZES are compressed layers
in place of an image: 16x12MB, 30MB+7.3MB+3622MB, NAME=30MB@base+900MB. Layers with the same
label after @ are the same bytes, and so are images written alike.

Each parameter is a flag with a value, or with a range: 31.5MB/s, 3..5MB/s, 22..31.5..46MB/s,
10Gbit/s. What is not given is fitted, measured or assumed; the answer says which. There is
no default for --hosts and for the price.

  muster estimate --hosts 32 --instance p5.48xlarge ghcr.io/org/app:1 ghcr.io/org/app:2
  muster estimate --hosts 32 --instance p5.48xlarge --rate 3..5MB/s --times 10 16x12MB`,
		Args: arguments(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.estimate(cmd.Context(), args, &f)
			if err != nil {
				return err
			}
			if f.html != "" {
				if err := writeFile(f.html, func(w io.Writer) error { return estimatePage(w, e) }); err != nil {
					return err
				}
			}
			return a.result(e, func(w io.Writer) { printEstimate(w, e) })
		},
	}
	c.Flags().IntVar(&f.hosts, "hosts", 0, "number of hosts that need the images")
	f.money.add(c, "instance type, for its price")
	c.Flags().StringVar(&f.registry, "registry", "", "registry as the model knows it (ghcr, ar, ...); default by the images' names")
	c.Flags().StringVar(&f.model, "model", "", "file of 'muster estimate fit'; default the study's model")
	c.Flags().IntVar(&f.times, "times", f.times, "how many times the images are needed one after another")
	c.Flags().StringVar(&f.platform, "platform", "", "platform of the images, such as linux/arm64; default this machine's")
	c.Flags().StringVar(&f.html, "html", "", "write a page with charts to this file; it needs no network")
	c.Flags().BoolVar(&f.measure, "measure", false, "measure on this machine what can be: how fast a core inflates (two seconds)")
	defaults := costmodel.Defaults(costmodel.Study(), "")
	for _, name := range slices.Sorted(maps.Keys(defaults)) {
		f.given[name] = c.Flags().String(name, "", fmt.Sprintf("%s: %s", defaults[name].Unit, defaults[name].Note))
	}
	a.jsonFlag(c)
	c.AddCommand(a.estimateFitCommand(), a.estimateEvaluateCommand())
	return c
}

// An estimation is costmodel's with the words of this command.
type estimation struct {
	costmodel.Estimation
	Model string `json:"model"` // what fitted parameters were fitted on
}

func (a *app) estimate(ctx context.Context, args []string, f *estimateFlags) (*estimation, error) {
	model, err := openModel(f.model)
	if err != nil {
		return nil, err
	}
	if f.times < 1 || f.times > 10_000 {
		return nil, badScenario("--times is %d; accepted are 1 to 10000", f.times)
	}
	s := costmodel.Scenario{Hosts: f.hosts, Slow: model.Spread.SlowShare}
	if f.hosts < 1 {
		return nil, badScenario("--hosts is %d; it must be 1 or more", f.hosts)
	}
	price, err := f.money.parameter()
	if err != nil {
		return nil, err
	}
	registry := f.registry
	for _, arg := range args {
		img, from, err := a.estimateImage(ctx, arg, f.platform)
		if err != nil {
			return nil, err
		}
		s.Images = append(s.Images, img)
		if registry == "" && from != "" {
			registry = costmodel.Registry(from)
		}
	}
	if len(s.Images)*f.times > 10_000 {
		return nil, badScenario("%d images %d times; accepted are 10000 pulls in all", len(s.Images), f.times)
	}
	s.Images = slices.Repeat(s.Images, f.times)
	s.Parameters = costmodel.Defaults(model, cmp.Or(registry, "unknown"))
	s.Parameters[costmodel.ParamPrice] = price
	if f.measure {
		if err := measureHere(ctx, s.Parameters); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(f.given)) {
		text := *f.given[name]
		if text == "" {
			continue
		}
		p := s.Parameters[name]
		if p.Range, err = parseRange(text, p.Unit); err != nil {
			return nil, badScenario("--%s: %v", name, err)
		}
		p.Origin, p.Note = costmodel.Given, "--"+name+" "+text
		s.Parameters[name] = p
	}
	e, err := costmodel.Estimate(s)
	if err != nil {
		return nil, err
	}
	return &estimation{e, model.Source}, nil
}

// openModel reads a model, or takes the study's.
func openModel(file string) (*costmodel.Model, error) {
	if file == "" {
		return costmodel.Study(), nil
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, badScenario("%v: a model is made by 'muster estimate fit'", err)
	}
	defer func() { _ = f.Close() }()
	m, err := costmodel.ReadModel(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return m, nil
}

// priceFlags say what a host costs.
type priceFlags struct{ instance, price string }

func (f *priceFlags) add(c *cobra.Command, instance string) {
	c.Flags().StringVar(&f.instance, "instance", "", instance+": "+instanceTypes())
	c.Flags().StringVar(&f.price, "price", "", "dollars per hour and host, in place of --instance")
}

func instanceTypes() string { return strings.Join(slices.Sorted(maps.Keys(costmodel.Instances)), ", ") }

func (f *priceFlags) given() bool { return f.instance != "" || f.price != "" }

func (f *priceFlags) parameter() (costmodel.Parameter, error) {
	switch {
	case f.price != "" && f.instance != "":
		return costmodel.Parameter{}, badScenario("--price and --instance are both given: one is enough")
	case f.instance != "":
		return costmodel.PriceOf(f.instance)
	case f.price == "":
		return costmodel.Parameter{}, badScenario("no price: give --price in dollars per hour and host, or --instance with one of %s",
			instanceTypes())
	}
	r, err := parseRange(f.price, "$/h")
	if err != nil {
		return costmodel.Parameter{}, badScenario("--price: %v", err)
	}
	return costmodel.Parameter{Name: costmodel.ParamPrice, Unit: "$/h", Range: r, Origin: costmodel.Given, Note: "--price " + f.price}, nil
}

// sizes is what an image's layers are written like.
var (
	sizesPattern = regexp.MustCompile(`^(?:([\w./:-]+)=)?((?:\d+x)?[\d.]+[kKMGT]i?B(?:@[\w.-]+)?(?:\+(?:\d+x)?[\d.]+[kKMGT]i?B(?:@[\w.-]+)?)*)$`)
	sizePattern  = regexp.MustCompile(`^(?:(\d+)x)?([\d.]+[kKMGT]i?B)(?:@([\w.-]+))?$`)
)

const maxSizesLayers = 10_000

// parseSizes reads layers written as sizes; ok is false for what is no sizes.
func parseSizes(s string) (img costmodel.Image, ok bool, err error) {
	m := sizesPattern.FindStringSubmatch(s)
	if m == nil {
		return img, false, nil
	}
	img.Name = cmp.Or(m[1], s)
	for _, part := range strings.Split(m[2], "+") {
		p := sizePattern.FindStringSubmatch(part)
		n := 1
		if p[1] != "" {
			if n, err = strconv.Atoi(p[1]); err != nil || n < 1 || n+len(img.Layers) > maxSizesLayers {
				return img, true, badScenario("%s: %s layers; accepted are 1 to %d", s, p[1], maxSizesLayers)
			}
		}
		var size Size
		if err := size.UnmarshalText([]byte(p[2])); err != nil || size < 1 {
			return img, true, badScenario("%s: %s is no size of a layer: write 12MB or 1.5GiB", s, p[2])
		}
		if p[3] != "" && n > 1 {
			return img, true, badScenario("%s: %s: a label names one layer, not %d", s, part, n)
		}
		for range n {
			name := "@" + p[3]
			if p[3] == "" {
				name = img.Name + " " + strconv.Itoa(len(img.Layers))
			}
			img.Layers = append(img.Layers, costmodel.Layer{Name: name, Bytes: float64(size)})
		}
	}
	return img, true, nil
}

// estimateImage is an image by sizes, in a layout or in a registry, whose host it returns. Only manifests are fetched.
func (a *app) estimateImage(ctx context.Context, arg, platform string) (img costmodel.Image, registry string, err error) {
	if img, ok, err := parseSizes(arg); ok || err != nil {
		return img, "", err
	}
	repo, err := a.repository(arg)
	if err != nil {
		return img, "", err
	}
	found, err := repo.Resolve(ctx, platform)
	if err != nil {
		return img, "", err
	}
	img.Name = arg
	for _, l := range found.Layers {
		if l.Size <= 0 {
			return img, "", badScenario("%s: its manifest gives no size of layer %s: write the sizes in place of the name, such as 30MB+900MB", arg, short(l.Digest))
		}
		img.Layers = append(img.Layers, costmodel.Layer{Name: string(l.Digest), Bytes: float64(l.Size)})
	}
	ref, err := origin.ParseReference(arg)
	return img, ref.Registry, err
}

// unitsOf are the units that a parameter's value may be written in, with their factors.
var unitsOf = map[string][]struct {
	name   string
	factor float64
}{
	"B/s": {
		{"Gbit/s", 1e9 / 8},
		{"Mbit/s", 1e6 / 8},
		{"GiB/s", 1 << 30},
		{"MiB/s", 1 << 20},
		{"GB/s", 1e9},
		{"MB/s", 1e6},
		{"kB/s", 1e3},
		{"B/s", 1},
	},
	"s":     {{"ms", 1e-3}, {"s", 1}},
	"share": {{"%", 0.01}},
}

// needsUnit are the units without which a value could be read in two ways.
var needsUnit = map[string]bool{"B/s": true}

// parseRange reads VALUE, LOW..HIGH or LOW..MIDDLE..HIGH; a unit behind the last number holds for all. The middle of two is
// their geometric mean.
func parseRange(text, unit string) (costmodel.Range, error) {
	number, factor, found := strings.TrimSpace(text), 1.0, false
	var names []string
	for _, u := range unitsOf[unit] {
		names = append(names, u.name)
		if rest, ok := strings.CutSuffix(number, u.name); ok {
			number, factor, found = strings.TrimSpace(rest), u.factor, true
			break
		}
	}
	want := "a number of " + unit
	if len(names) > 0 {
		want = "a number with one of " + strings.Join(names, ", ")
	}
	bad := fmt.Errorf("%q is not %s, nor a range like LOW..HIGH or LOW..MIDDLE..HIGH", text, want)
	if needsUnit[unit] && !found {
		return costmodel.Range{}, bad
	}
	var v []float64
	for _, part := range strings.Split(number, "..") {
		x, err := strconv.ParseFloat(strings.TrimSpace(part), 64)
		if err != nil || math.IsNaN(x) || math.IsInf(x, 0) || x < 0 {
			return costmodel.Range{}, bad
		}
		v = append(v, x*factor)
	}
	if !slices.IsSorted(v) {
		return costmodel.Range{}, bad
	}
	switch len(v) {
	case 1:
		return costmodel.Range{Low: v[0], Mid: v[0], High: v[0]}, nil
	case 2:
		mid := math.Sqrt(v[0] * v[1])
		if v[0] == 0 {
			mid = v[1] / 2
		}
		return costmodel.Range{Low: v[0], Mid: mid, High: v[1]}, nil
	case 3:
		return costmodel.Range{Low: v[0], Mid: v[1], High: v[2]}, nil
	}
	return costmodel.Range{}, bad
}

// writeFile writes a file whole or not at all.
func writeFile(name string, write func(io.Writer) error) error {
	f, err := os.Create(name)
	if err != nil {
		return badScenario("%v", err)
	}
	if err = write(f); err == nil {
		err = f.Close()
	} else {
		_ = f.Close()
	}
	if err != nil {
		_ = os.Remove(name)
	}
	return err
}
