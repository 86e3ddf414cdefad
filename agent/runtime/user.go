package runtime

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// startBwrap uses bubblewrap. It stays between the stage and the command, so the command's own process
// number is asked for: signals and the exit code are then the command's, not bubblewrap's.
func (s *stage) startBwrap(binary string, p process) (running, error) {
	info, theirs, err := os.Pipe()
	if err != nil {
		return running{}, err
	}
	defer info.Close()
	defer theirs.Close()
	cmd := exec.Command(binary, append([]string{
		// Devices are allowed because those below the root are the stage's choice.
		"--unshare-user", "--dev-bind", s.root, "/", "--chdir", p.dir, "--info-fd", "3", "--", p.path,
	}, p.args[1:]...)...)
	cmd.Env = p.env
	cmd.ExtraFiles = []*os.File{theirs}
	r, err := s.spawn(cmd)
	if err != nil {
		return r, err
	}
	_ = theirs.Close()
	// It writes one object and closes, or ends and closes.
	var said struct {
		Child int `json:"child-pid"`
	}
	if err := json.NewDecoder(info).Decode(&said); err != nil || said.Child <= 1 {
		r.drop()
		return r, fmt.Errorf("bwrap ended with code %d before it started the command", waitChild(r.ends))
	}
	r.pid = said.Child
	return r, nil
}

// startChRun uses Charliecloud. It executes the command in its own process.
func (s *stage) startChRun(binary string, p process) (running, error) {
	env := filepath.Join(s.dir, "bundle", "env")
	// One NAME=VALUE a line; a value with a newline cannot be said, and is left out.
	var lines strings.Builder
	for _, kv := range p.env {
		if !strings.Contains(kv, "\n") {
			lines.WriteString(kv + "\n")
		}
	}
	if err := os.WriteFile(env, []byte(lines.String()), 0o600); err != nil {
		return running{}, err
	}
	args := []string{"--unset-env=*", "--set-env=" + env, "--cd=" + p.dir, "--no-passwd", "--private-tmp"}
	if !s.o.ReadOnly {
		args = append(args, "--write")
	}
	cmd := exec.Command(binary, append(append(args, s.root, "--", p.path), p.args[1:]...)...)
	cmd.Env = append(os.Environ(), "USER="+callerName(s.uid)) // it ends when USER is not set
	return s.spawn(cmd)
}

// startApptainer uses Apptainer's own user namespace. It executes the command in its own process.
func (s *stage) startApptainer(binary string, p process) (running, error) {
	args := []string{
		"--silent", "exec", "--userns", "--cleanenv", "--no-home", "--no-mount", "home,cwd,tmp,hostfs,bind-paths,dev,proc,sys,devpts",
		"--pwd", p.dir,
	}
	if !s.o.ReadOnly {
		args = append(args, "--writable")
	}
	cmd := exec.Command(binary, append(append(args, s.root, p.path), p.args[1:]...)...)
	cmd.Env = os.Environ()
	for _, kv := range p.env {
		cmd.Env = append(cmd.Env, "APPTAINERENV_"+kv)
	}
	return s.spawn(cmd)
}
