// Renders conversations with a template of a Modelfile, as Ollama does: reads JSON from standard input,
// {"template": ..., "system": ... or null, "conversations": [[{"role": ..., "content": ...}, ...], ...]},
// and writes a JSON list of texts. A conversation without a system message gets that of the Modelfile.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

func main() {
	var input struct {
		Template      string      `json:"template"`
		System        *string     `json:"system"`
		Conversations [][]Message `json:"conversations"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(input.Template))
	texts := []string{}
	for _, messages := range input.Conversations {
		if input.System != nil && messages[0].Role != "system" {
			messages = append([]Message{{"system", *input.System}}, messages...)
		}
		var text strings.Builder
		if err := parsed.Execute(&text, map[string]any{"Messages": messages}); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
