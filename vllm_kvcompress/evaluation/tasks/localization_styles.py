"""Training styles of localization: something is to be found in the text.

See `instructions` for the format, `heldout_styles` for the styles that are never trained on.
"""

LOCALIZATION = """
# passages-answer
{Answer|Please answer} the question {based on|using only} the {given|following} passages. \
{Reply with the answer alone.|Give just the answer.|}
[passages]
{Answer the question based on the passages above.|}
Question: {question}
Answer:
# story-question
You {get|are given} a {story|novel|film script} and a question about it. \
Answer {in a few words|with one short phrase} and {explain nothing|add nothing}.
Story:
[story]
{Now answer the question about the story as shortly as you can.|}
Question: {question}
# paper-question
You are given a scientific {article|paper} and a question. Answer with a phrase or a sentence \
from the article. If the article does not say, write "unanswerable".
[sections]
Question: {question}
{Answer:|Your answer:}
# bare-question
[any]
{question}
# q-a-line
[any]
Q: {question}
A:
# according-to
[any]
According to the {document|text above|article|page}, {ask}
# question-first
{{question}|Question: {question}|I {want|need} to know {ask}}
{The answer is somewhere in this text|Use the text below to find out|Look here|Context|Passage}:
[any]
{Answer:|}
# question-twice
Question: {question}
{Keep it in mind while you read.|Read on to answer it.}
[any]
{So, once more|Again|The question was}: {question}
# exam
READING COMPREHENSION. Read the {passage|text} carefully, then answer the question below it.
[prose]
{num}. {question}
{(2 points)|Write your answer here:|}
# multiple-choice
Read the {passage|extract} and choose the {correct|best} option.
[any]
{question}
A. {phrase}
B. {phrase}
C. {phrase}
D. {phrase}
{Correct option:|Answer with one letter.|The letter of the right answer is}
# multiple-choice-bare
[any]
{question}
(A) {phrase} (B) {phrase} (C) {phrase}
# multi-hop
The {documents|paragraphs} below together hold the facts needed for the question. \
{Combine them where you must.|Reason over several of them.}
[passages]
{Question|Multi-hop question}: {question}
{Short answer:|Final answer:|So the answer is}
# log-incident
{Here is the log of our server.|These are last night's logs.|}
[log]
{When was the {noun} first {verb}?|Which host failed right before {time}?|What is the id of the \
first error after {time}?}
# contract-clause
You are a {paralegal|lawyer} and you look things up in agreements.
[sections]
{Under which clause may the tenant leave early?|What notice period does the contract set for the \
{noun}?|Which party pays for the {noun}, and where does it say so?}
# manual
{This is the manual of my {noun}.|Manual:}
[sections]
{How do I reset the {noun}?|Which button do I press to open the {noun}?|What does error {num} \
mean?|How often must the {noun} be cleaned?}
# magic-number
{Some special magic numbers are hidden in the text below. Remember them, I will ask for \
one.|A special magic number is hidden in this text. Remember it.}
[any]
What is the special magic number for {magic} {in the text|mentioned above}? \
{The special magic number for {magic} is|}
# pass-key
Somewhere in a lot of irrelevant text there is one important fact. Find it and remember it.
[any]
What is the pass key? The pass key is
# secret-code
[any]
What is the secret {code|number|word} that was mentioned in the text? Write only the {code|answer}.
# key-value
Below is a {JSON object|dictionary} with keys and values. Return the value of the key I name.
[records]
Key: "{key}"
{Corresponding value:|Value:}
# key-value-ask
[records]
What is the value {stored under|of} "{key}"?
# line-lookup
Every line of this record starts with its name. You will be asked for the content of one line.
[table]
{Tell me|Give me|Return|Repeat} the {content|value} of {line|entry|record} {noun}-{noun}. \
{The content is|It says|}
# find-sentence
[any]
{Find|Locate|Look for|Give me} the {sentence|line|passage|place} {in the text above|of the \
document|} that {mentions|speaks of|deals with|contains} {{topic}|{who}} and copy it{ out|}.
# quote-evidence
[any]
{Quote|Cite|Copy}{, word for word,| exactly} the {passage|sentence|lines} that {supports|proves|\
backs} {this statement|the claim}: "{sentence}"
# which-paragraph-says
[paragraphs]
In which {paragraph|section} does it say that {topic} was discussed by {who}?
# yes-no
[any]
{Is it true that {who} {verb} the {noun}?|Did {who} {verb} the {noun}?|Does {org} have a \
{noun}?|Was the {noun} ever {verb}?|Has {who} been to {place}?} {Answer|Say|Reply} yes or no\
{ from the text|}.
# claim-check
Decide whether the {document|text} supports the claim{: supported, refuted or not mentioned|}.
[any]
Claim: {sentence}
{Verdict:|Supported, refuted or not mentioned?}
# patient-record
{Patient record|Discharge notes}:
[any]
{What dose of the {noun} drug was given on {date}?|Which allergy does {who} have?|What was the \
patient's blood pressure on admission?}
# search-results
Answer the user's question with the search results below and cite them like [1]. \
{If they do not hold the answer, say that you do not know.|Do not use other knowledge.}
[passages]
User question: {question}
# rag-context
Use the pieces of context to {answer|reply to} the question at the end. \
{Never make up an answer.|If you don't know, say so.}
Context:
[passages]
Question: {question}
{Helpful answer:|Answer:}
# rag-not-prior
Context information is below.
[any]
{With this context and no prior knowledge, answer the query.|Given only this information, reply.}
Query: {question}
{Answer:|Reply:}
# tagged-question
<context>
[any]
</context>
<question>{question}</question>
{Put your answer in <answer> tags.|}
# support-desk
You are a support agent of {org}. Rely only on the knowledge base and stay polite.
[faq]
Customer: {question}
Agent:
# code-where
{Here is a source file.|File {noun}.py:|}
[code]
{Which function {reads|writes} the {noun}?|In which line is `{noun}` defined?|Where is the {noun} \
checked for null?}
# code-value
[code]
{What does `{verb}` return when the {noun} is empty?|What is the default of the parameter \
`{noun}`?|Which exception is raised if `{noun}` is missing?}
# table-cell
[table]
{What is the {noun} of {person}?|Which {noun} belongs to {place}?|Give the number in the row of \
{org}.|Who has {num} in the last column?}
# chat-who
{The following is a chat between friends.|Conversation:}
[dialogue]
{Who suggested {topic}?|When does {who} arrive?|What did {who} buy for {name}?|Where will they \
meet?}
# mail-fact
[mail]
{When is the meeting with {who}?|What is the tracking number of the {noun}?|Who else was copied on \
the mail about the {noun}?}
# fill-blank
{Fill the blank with words of the text.|Complete the sentence from the text.}
[any]
{{who} ____ the {noun} in {year}.|The {noun} was {verb} in ____.|____ is the owner of the {noun}.}
# extract-name
{Extract|Find|Give|Identify|State} the name of the {person who {verb} the {noun}|company that owns \
the {noun}|city where {who} lives}{ from the text|}. Return the name {only|and nothing else}.
[any]
{Name:|}
# extract-date
[any]
On which date was the {noun} {verb}? Respond with the date only, as YYYY-MM-DD.
# json-answer
{Look up the answer in the text.|}
[any]
{question} Respond as JSON: {lb}"answer": "..."{rb}
# short-answer-only
[any]
{question} {Answer in at most five words.|One word is enough.|Just the name, please.}
# informal
[any]
{hey can you check in there|pls look up|quick one,} {ask}
# section-locate
[sections]
{Where in the document is|In which section is|On which page is} {topic} {discussed|mentioned}? \
{Give its number.|}
# bridging
Answer the question. {You have to go through two of the texts to find the answer.|}
[passages]
{What is the nationality of the director of {noun}?|In which city was the founder of {org} \
born?|Who is the mother of the author of "{adj} {noun}"?}
# handbook
{You answer staff questions from the employee handbook.|Employee handbook of {org}}
[sections]
{How many days of leave do I get after {num} years?|May I work from {place}?|Who approves travel \
costs?}
# judgment
{The judgment of the court reads as follows.|Read the judgment.}
[paragraphs]
{What sentence did {who} receive?|Which article did the judge rely on?|When was the appeal \
filed?}
# annual-report
From the annual report of {org}:
[sections]
{What was the revenue in {year}?|Who chairs the board?|By how many percent did the {noun} grow in \
{year}?}
# not-found
Answer from the text below. If the answer is not in it, reply "not found".
[any]
{question}
# interview
[transcript]
What did {who} say about {topic}{ in the interview|}?
# question-list
Answer these questions about the text{, one line each|}.
[any]
1. {question}
2. {other}
3. {other}
# word-code
Each word below belongs to a code. {Memorise the codes.|}
[records]
{Retrieve|Recall|Look up|What is} the {code|number|value} {that belongs to|for|stored with} \
{the word|} "{magic}"{.|?}
# follow-up
{You are discussing a document with a user.|}
[any]
{One more question about the document|Thanks! And another thing|OK, next}: {ask}
# api-docs
API reference of {org}
[sections]
{Which endpoint do I call to create a {noun}?|What status code means that the {noun} was \
{verb}?|Which parameter limits the number of {noun}s?}
# how-much
[any]
{How many grams of {noun} does it take?|How much does the {adj} {noun} weigh?|What is the price of \
the {noun}?|How far is {place} from the {noun}?}
# definition
[any]
How does the text define "{noun}"? {Quote the definition.|}
# span
{Passage|Text}:
[any]
Extract the span that answers the question "{question}"
Span:
# reason-given
[any]
What reason does {who} give for leaving {place}? {Refer to the text.|}
# detail-hunt
I am looking for one detail in this document.
[any]
{What phone number is given for {org}?|Which serial number does the {noun} have?|What is the \
street address of {who}?}
# find-imperative
[any]
{Find|Identify|Retrieve|Look up|Give|State|Name} {the date when|the year in which|the city where|the \
person who|the reason why|the price for which} {the {noun} was {verb}|{who} {verb} the {noun}}.
# look-up-field
{Look up one value in the data.|}
[any]
{Get|Return|Fetch|Extract} the {id|price|date|phone number|address|version|{noun}} of {{who}|{org}|\
the {adj} {noun}}{ only|}.
# tell-me
[any]
{Tell me|Do you know|I'd like to know|Please tell me|I was wondering} {who|when|where|why} {the \
{noun} was {verb}|{who} {verb} the {noun}}.
# given-the-text
Given the {text|following document|passage|article|transcript}, {answer the question|reply to the \
user's question|respond to the query}{ below|}.
[any]
{Question|Query|User}: {question}
# specific-question
I have a {specific|simple|factual} question about {this document|the text below}.
[any]
{{question}|My question: {question}}
# facts-only
{Only use facts stated in the text.|Stick to the text.|Base your answer on the source alone.}
[any]
{question}
{Answer:|}
# number-answer
[any]
{question} {Answer with a number{ only|}.|Give the exact figure.|Write only the number.}
# de-passages
{Beantworte die Frage anhand der folgenden Texte.|Lies den Text und beantworte die Frage.}
[de]
Frage: {de_asked}
Antwort:
# de-plain
[de]
{de_asked} {Antworte kurz.|}
# de-imperative
[any]
{Finde|Suche|Nenne|Gib mir} {das Datum, an dem {who} ankam|den Namen des Mieters|die Nummer der \
Klausel|den Preis} {im Text|aus dem Dokument|}.
# de-find
[any]
{An welcher Stelle steht, dass {who} in {place} war?|Welche Nummer hat der Abschnitt über den \
Vertrag?|Suche den Satz, in dem {who} erwähnt wird.}
# fr-passages
{Réponds à la question à l'aide des textes ci-dessous.|Lis le texte puis réponds à la question.}
[fr]
Question : {fr_asked}
Réponse :
# fr-plain
[fr]
{fr_asked} {Réponds en un mot.|}
# fr-imperative
[any]
{Trouve|Cherche|Indique|Donne-moi} {la date d'arrivée de {who}|le nom du locataire|le numéro de la \
clause|le prix} {dans le texte|du document|}.
# fr-find
[any]
{Dans quel paragraphe parle-t-on de {who} ?|Trouve la phrase qui mentionne {place}.|Quel est le \
numéro de la clause sur le loyer ?}
# es-passages
{Responde a la pregunta con los textos siguientes.|Lee el texto y responde a la pregunta.}
[es]
Pregunta: {es_asked}
Respuesta:
# es-plain
[es]
{es_asked} {Responde brevemente.|}
# es-imperative
[any]
{Busca|Encuentra|Indica|Dame} {la fecha en que llegó {who}|el nombre del inquilino|el número de la \
cláusula|el precio} {en el texto|del documento|}.
# es-find
[any]
{¿En qué párrafo se habla de {who}?|Busca la frase que menciona {place}.|¿Qué número tiene la \
cláusula del alquiler?}
# zh-passages
{请根据下面的文章回答问题。|阅读以下文本，然后回答问题，只给出答案。}
[zh]
问题：{zh_asked}
{回答：|答案：}
# zh-plain
[zh]
{问：|请问|}{zh_asked}{根据上文回答。|}
# zh-find
[any]
{文中哪一段提到了{place}？|请找出提到{who}的那句话。|合同第几条规定了租金？|{who}的电话号码是多少？\
|在文中查找会议的日期。}
"""
