package costmodel

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
)

// What an [Event] pulled.
const (
	ContentApp   = "app"   // an application: only these say anything about networks
	ContentZeros = "zeros" // layers of zeros: inflating and disk, hardly any transfer
)

// An Event is one host's pull of one image, in the columns of the study (shared data "pull_events.csv") and of muster's own
// reports. Bytes are compressed unless they say otherwise; times are seconds.
type Event struct {
	Run           string  // one pull of one image on one cluster
	Experiment    string  // a campaign: what ran in the same weeks with the same set-up
	Strategy      string  // how images came to the hosts: cloud, registry, disk
	Image         string  // name and tag
	Content       string  // ContentApp or ContentZeros
	TotalBytes    float64 // of the image
	NewBytes      float64 // that the host did not have yet, as far as it is known
	UnpackedBytes float64 // inflated; 0 where it is not known
	Layers        float64 // 0 where it is not known
	ClusterNodes  int     // hosts of the cluster; a run may have been seen on fewer
	InstanceType  string
	Node          string  // name of the host within its cluster
	Start         float64 // from the first start of the run
	Pull          float64 // from the host's start until the image was there
	Suspect       bool    // the layers were probably there already
}

// ErrEvents is what is wrong with a file of events: its text is one line that says what is accepted.
var ErrEvents = errors.New("events")

func badEvents(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrEvents, fmt.Sprintf(format, args...))
}

// Limits of what is read, so that a wrong file costs little.
const (
	maxEvents   = 2_000_000
	maxField    = 1024
	maxSeconds  = 86400 // a pull of more than a day is a file in milliseconds
	maxByteSize = 1 << 50
	leastBytes  = 1e4 // compressed bytes of the median event: less is a file in MB
)

// leastSpeed is compressed bytes per second of the median pull, a thousandth of which a file in milliseconds has: the
// study's are 31 MB/s, and 530 kB/s for zeros, which hardly have compressed bytes.
var leastSpeed = map[string]float64{ContentApp: 100e3, ContentZeros: 5e3}

// columns of a file of events. The order is the study's and is what [WriteEvents] writes.
var columns = []struct {
	name     string
	required bool
}{
	{"run_id", true},
	{"experiment", true},
	{"strategy", true},
	{"image", true},
	{"content", true},
	{"total_bytes", true},
	{"new_bytes", true},
	{"unpacked_bytes", false},
	{"layers", false},
	{"cluster_nodes", true},
	{"nodes_observed", false},
	{"instance_type", true},
	{"node", true},
	{"iteration", false},
	{"start_s", true},
	{"pull_s", true},
	{"wait_s", false},
	{"pods_on_node", false},
	{"suspect_cached", false},
	{"clock", false},
}

// ReadEvents reads events from CSV with a header. Columns may come in any order; those that the model has no use for
// may be missing, unknown ones are ignored. Errors are [ErrEvents] and name line and column; values in other units
// than the columns say (milliseconds, megabytes) are errors where they can be recognised.
func ReadEvents(r io.Reader) ([]Event, error) {
	c := csv.NewReader(r)
	c.ReuseRecord = true
	header, err := c.Read()
	if errors.Is(err, io.EOF) {
		return nil, badEvents("the file is empty; its first line must name the columns %s", requiredColumns())
	} else if err != nil {
		return nil, badEvents("no CSV: %v", err)
	}
	at := map[string]int{}
	for i, name := range header {
		name = strings.TrimSpace(strings.TrimPrefix(name, "\ufeff"))
		if _, twice := at[name]; twice && name != "" {
			return nil, badEvents("column %.60q is there twice", name)
		}
		at[name] = i
	}
	var missing []string
	for _, col := range columns {
		if _, ok := at[col.name]; !ok && col.required {
			missing = append(missing, col.name)
		}
	}
	if len(missing) > 0 {
		return nil, badEvents("column %s missing; needed are %s", strings.Join(missing, ", "), requiredColumns())
	}
	var events []Event
	names := map[string]string{} // one copy of each name
	for {
		rec, err := c.Read()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, badEvents("%v", err)
		}
		line, _ := c.FieldPos(0)
		if len(events) == maxEvents {
			return nil, badEvents("line %d: more than %d events", line, maxEvents)
		}
		p := record{rec: rec, at: at, line: line, names: names}
		e := p.event()
		if p.err != nil {
			return nil, p.err
		}
		events = append(events, e)
	}
	return events, checkUnits(events)
}

func requiredColumns() string {
	var all []string
	for _, col := range columns {
		if col.required {
			all = append(all, col.name)
		}
	}
	return strings.Join(all, ", ")
}

// A record reads the fields of one line; err is the first thing wrong.
type record struct {
	rec   []string
	at    map[string]int
	line  int
	names map[string]string
	err   error
}

func (p *record) field(name string) (string, bool) {
	i, ok := p.at[name]
	if !ok {
		return "", false
	}
	return strings.TrimSpace(p.rec[i]), true
}

func (p *record) fail(format string, args ...any) {
	if p.err == nil {
		p.err = badEvents("line %d: %s", p.line, fmt.Sprintf(format, args...))
	}
}

func (p *record) text(name string) string {
	s, _ := p.field(name)
	if s == "" || len(s) > maxField {
		p.fail("%s is empty or longer than %d bytes", name, maxField)
		return ""
	}
	if known, ok := p.names[s]; ok {
		return known
	}
	s = strings.Clone(s)
	p.names[s] = s
	return s
}

// number is the value of a column within [low, high]; absent tells that an empty field is 0.
func (p *record) number(name string, low, high float64, absent bool, unit string) float64 {
	s, ok := p.field(name)
	if (!ok || s == "") && absent {
		return 0
	}
	v, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(v) || v < low || v > high {
		p.fail("%s is %.40q; it must be a number of %s from %g to %g", name, s, unit, low, high)
		return 0
	}
	return v
}

func (p *record) event() Event {
	e := Event{
		Run: p.text("run_id"), Experiment: p.text("experiment"), Strategy: p.text("strategy"), Image: p.text("image"),
		Content: p.text("content"), InstanceType: p.text("instance_type"), Node: p.text("node"),
		TotalBytes:    p.number("total_bytes", 1, maxByteSize, false, "bytes"),
		NewBytes:      p.number("new_bytes", 0, maxByteSize, false, "bytes"),
		UnpackedBytes: p.number("unpacked_bytes", 0, maxByteSize, true, "bytes"),
		Layers:        p.number("layers", 0, 1e6, true, "layers"),
		ClusterNodes:  int(p.number("cluster_nodes", 1, 1e7, false, "hosts")),
		Start:         p.number("start_s", 0, maxSeconds*30, false, "seconds"),
		Pull:          p.number("pull_s", 0, maxSeconds, false, "seconds"),
	}
	switch e.Content {
	case ContentApp, ContentZeros, "":
	default:
		p.fail("content is %.40q; it must be app or zeros", e.Content)
	}
	if e.NewBytes > e.TotalBytes*1.001 {
		p.fail("new_bytes %.0f is more than total_bytes %.0f", e.NewBytes, e.TotalBytes)
	}
	switch s, _ := p.field("suspect_cached"); strings.ToLower(s) {
	case "", "0", "false", "0.0":
	case "1", "true", "1.0":
		e.Suspect = true
	default:
		p.fail("suspect_cached is %.40q; it must be 0 or 1", s)
	}
	return e
}

// checkUnits finds files whose numbers are no seconds or no bytes: single values may be odd, the median is not.
func checkUnits(events []Event) error {
	if len(events) == 0 {
		return badEvents("no line of data after the header")
	}
	var bytes []float64
	speed := map[string][]float64{}
	for _, e := range events {
		bytes = append(bytes, e.TotalBytes)
		speed[e.Content] = append(speed[e.Content], max(e.NewBytes, 1)/max(e.Pull, 0.05))
	}
	if m := median(bytes); m < leastBytes {
		return badEvents("the median of total_bytes is %.0f: sizes must be in bytes, not in MB", m)
	}
	for content, least := range leastSpeed {
		if m := median(speed[content]); m < least {
			return badEvents("the median pull of content %s is %.3g kB/s: pull_s must be in seconds, not in milliseconds", content, m/1e3)
		}
	}
	return nil
}

// WriteEvents writes events in the study's columns. Columns that an Event does not hold are left empty.
func WriteEvents(w io.Writer, events []Event) error {
	c := csv.NewWriter(w)
	head := make([]string, len(columns))
	for i, col := range columns {
		head[i] = col.name
	}
	if err := c.Write(head); err != nil {
		return err
	}
	seen := map[string]int{}
	for _, e := range events {
		seen[e.Run]++
	}
	number := func(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }
	known := func(v float64) string {
		if v == 0 {
			return ""
		}
		return number(v)
	}
	for _, e := range events {
		suspect := "0"
		if e.Suspect {
			suspect = "1"
		}
		if err := c.Write([]string{
			e.Run, e.Experiment, e.Strategy, e.Image, e.Content, number(e.TotalBytes), number(e.NewBytes),
			known(e.UnpackedBytes), known(e.Layers), strconv.Itoa(e.ClusterNodes), strconv.Itoa(seen[e.Run]), e.InstanceType,
			e.Node, "", number(e.Start), number(e.Pull), "", "", suspect, "",
		}); err != nil {
			return err
		}
	}
	c.Flush()
	return c.Error()
}

// Usable drops the events that say nothing: pulls of layers that were there already.
func Usable(events []Event) []Event {
	return slices.DeleteFunc(slices.Clone(events), func(e Event) bool { return e.Suspect || e.Pull <= 0.05 })
}

func median(x []float64) float64 { return Quantile(x, 0.5) }

// Quantile is the q-quantile of x by linear interpolation between order statistics, NaN for none. It leaves x as it is.
func Quantile(x []float64, q float64) float64 {
	if len(x) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(x))
	at := q * float64(len(s)-1)
	i := int(at)
	if i+1 >= len(s) {
		return s[len(s)-1]
	}
	return s[i] + (at-float64(i))*(s[i+1]-s[i])
}
